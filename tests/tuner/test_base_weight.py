"""`base_weight`: other ways to W than in place: other quantization backends, and layers that cannot be read."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.ops.reference import sparse_linear as reference_linear
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from tests.models import logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter


def layer_with_mask(base_layer: nn.Module, nnz: int = 20) -> SpftLinear:
    layer = SpftLinear(base_layer, "default")
    entries = layer.out_features * layer.in_features
    at = torch.randperm(entries, generator=torch.Generator().manual_seed(0))[:nnz].sort().values
    layer.set_mask("default", mask_from_positions(at, layer.out_features, layer.in_features), torch.randn(nnz))
    return layer


def test_a_weight_that_is_no_contiguous_block_is_left_alone():
    torch.manual_seed(0)
    base = nn.Linear(13, 7)
    base.weight = nn.Parameter(torch.randn(13, 7).t(), requires_grad=False)
    before = base.weight.detach().clone()
    layer = layer_with_mask(base)
    assert not layer.in_place
    x = torch.randn(3, 13)
    mask, values = layer.mask("default"), layer.spft_values["default"]
    torch.testing.assert_close(layer(x), reference_linear(x, before, base.bias, values, mask))
    layer(x).sum().backward()
    assert torch.equal(base.weight, before)


class UnreadableLinear(nn.Module):
    """A linear layer of a quantized kind that can be multiplied but not read: as GPTQ and AWQ layers are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight, self.bias)


@pytest.fixture
def forward_only_layer(monkeypatch):
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("axolotl_spft.tuner.layer.resolve_quantization_backend", lambda *_, **__: backend)
    torch.manual_seed(0)
    base = UnreadableLinear(nn.Linear(13, 7))
    monkeypatch.setattr("axolotl_spft.tuner.layer._get_in_out_features", lambda layer: (13, 7))
    monkeypatch.setattr(
        SpftLinear, "_get_base_layer_device_and_dtype", lambda self, layer: (torch.device("cpu"), torch.float32)
    )
    return layer_with_mask(base)


def test_a_layer_that_cannot_be_read_adds_the_sparse_branch(forward_only_layer):
    layer = forward_only_layer
    assert layer.forward_only
    base = layer.get_base_layer()
    x = torch.randn(2, 3, 13, requires_grad=True)
    values = layer.spft_values["default"]
    expected = reference_linear(x, base.qweight, base.bias, values, layer.mask("default"))
    got = layer(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), (x, values)), torch.autograd.grad(expected.square().sum(), (x, values))
    ):
        torch.testing.assert_close(one, other)
    with pytest.raises(SpftError, match="a gptq layer cannot be merged"):
        layer.merge()


def test_torchao_base_equals_its_dequantized_self(tmp_path):
    """Another backend of PEFT through the same path."""
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_llama().save_pretrained(tmp_path / "base")

    def torchao_model():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
            dtype=torch.float32,
            attn_implementation="eager",
        )

    base = torchao_model()
    plain = tiny_llama()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            plain.get_submodule(name).weight = nn.Parameter(module.weight.dequantize().detach())
    model, expected = with_adapter(base), with_adapter(plain)
    assert not any(layer.in_place for layer in adapted_layers(model).values())
    one, other = model(**token_batch()), expected(**token_batch())
    assert (one.logits - other.logits).abs().max() <= 1e-4 * other.logits.abs().max()
    one.loss.backward()
    other.loss.backward()
    for got, want in zip(adapted_layers(model).values(), adapted_layers(expected).values()):
        got, want = got.spft_values["default"].grad, want.spft_values["default"].grad
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(torchao_model(), tmp_path)), adapted)
    model.merge_adapter()
    assert not torch.equal(logits(model), logits(torchao_model()))
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)


def test_in_place_merge_writes_only_the_mask():
    model = with_adapter(tiny_llama())
    before = weights_of(tiny_llama())
    model.merge_adapter()
    for name, layer in adapted_layers(model).items():
        changed = (layer.get_base_layer().weight != before[f"{name}.weight"]).flatten()
        at = layer.storage_positions(layer.mask("default")).long()
        assert not changed.index_fill(0, at, False).any()
        assert changed[at].float().mean() > 0.9
    assert same_weights(model.unload(), weights_of(tiny_llama())) is False  # unload keeps a merge, as PEFT's tuners do


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_where_torch_itself_writes_it_can_be_deterministic(dtype):
    torch.manual_seed(0)
    layer, x = layer_with_mask(nn.Linear(13, 7).to(dtype)), torch.randn(3, 13, dtype=dtype)
    expected = layer(x)
    torch.use_deterministic_algorithms(True)
    try:
        layer.revert()
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y, expected)
        assert layer.spft_values["default"].grad.any()
        layer.merge()
        layer.unmerge()
    finally:
        torch.use_deterministic_algorithms(False)
