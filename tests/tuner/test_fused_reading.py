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
