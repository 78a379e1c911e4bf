"""torch's encoder layer, which would read the weights in it past the sparse layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from axolotl_spft import SpftConfig

TARGETS = ["linear1", "linear2"]


class Encoder(nn.Module):
    def __init__(self, stacked: bool):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2) if stacked else layer

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_loaded_adapter_is_in_the_first_evaluation(tmp_path, stacked, padded):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    seen = slice(None) if not padded else slice(3)
    get_peft_model(
        Encoder(stacked), SpftConfig(density=0.1, target_modules=TARGETS, init_weights=False)
    ).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Encoder(stacked), tmp_path).eval()
    expected = copy.deepcopy(model).merge_and_unload().train()(x, padding)[:, seen]
    base = Encoder(stacked).eval()
    with torch.no_grad():
        for each in (model, copy.deepcopy(model)):
            for _ in range(2):
                torch.testing.assert_close(each(x, padding)[:, seen], expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(x, padding)[:, seen], base(x, padding)[:, seen])
        assert not torch.allclose(expected, base(x, padding)[:, seen], atol=0.01)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("flags", [(True, True), (False, True)])
def test_an_encoder_that_is_given_back_reads_as_before(mixed, flags):
    base = Encoder(True)
    base.encoder.use_nested_tensor, base.encoder.enable_nested_tensor = flags
    config = SpftConfig(density=0.1, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(base, config, mixed=mixed)
    model.add_adapter("other", config)
    assert not base.encoder.use_nested_tensor
    before = set(vars(Encoder(True).encoder))
    for back in (copy.deepcopy(model).unload(), copy.deepcopy(model).merge_and_unload(), model.unload()):
        encoder = back.encoder
        assert (encoder.use_nested_tensor, encoder.enable_nested_tensor) == flags
        assert set(vars(encoder)) == before


def test_an_encoder_that_could_not_be_merged_still_calls_its_layers():
    config = SpftConfig(density=0.1, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(Encoder(True), config).eval()
    with torch.no_grad():
        model.base_model.model.encoder.layers[0].linear2.spft_values["default"][0] = torch.nan
    with pytest.raises(ValueError, match="seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert not model.base_model.model.encoder.use_nested_tensor
