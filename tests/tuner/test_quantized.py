"""Real bitsandbytes bases: equal to their own dequantized weights, restored bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from tests.interpreter import DEVICE
from tests.models import ARCHITECTURES, logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter
from tests.tuner.test_gradients import assert_gradients_equal, backward

KINDS = ["4bit", "4bit-double", "8bit"]


def quantized_layer(weight: torch.Tensor, bias: torch.Tensor | None, kind: str, dtype: torch.dtype) -> nn.Module:
    weight, (out_features, in_features) = weight.cpu(), weight.shape  # on its way to a device it is quantized
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias is not None, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            in_features, out_features, bias is not None, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=kind == "4bit-double",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=kind == "4bit-double"
        )
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer.to(DEVICE)


def quantize(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            bias = None if module.bias is None else module.bias.detach()
            setattr(parent, name.rpartition(".")[2], quantized_layer(module.weight.detach(), bias, kind, dtype))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain linear layers that hold the dequantized weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device=DEVICE)
            weight = dequantize_module_weight(module)
            plain.weight = nn.Parameter(weight.float())
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().float())
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], plain)
    return model


def copy_adapter(source: PeftModel, target: PeftModel) -> None:
    for one, other in zip(adapted_layers(source).values(), adapted_layers(target).values(), strict=True):
        other.set_mask("default", one.mask("default"), one.spft_values["default"].detach().float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_forward_and_gradients_equal_those_of_the_dequantized_model(kind, architecture):
    base = quantize(ARCHITECTURES[architecture](), kind)
    plain = with_adapter(dequantized(base))
    model = with_adapter(base)
    copy_adapter(model, plain)
    tolerance = 1e-5 if kind != "8bit" else 2e-3  # 8 bit: the dequantized weight is float16
    one, other = (m(**token_batch()) for m in (model, plain))
    assert (one.logits - other.logits).abs().max() <= tolerance * other.logits.abs().max()
    one.loss.backward()
    other.loss.backward()
    for (name, got), expected in zip(adapted_layers(model).items(), adapted_layers(plain).values()):
        got, expected = (layer.spft_values["default"].grad.float() for layer in (got, expected))
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() <= 10 * tolerance * expected.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_restores_the_quantized_base_bit_for_bit(kind, tmp_path):
    base = quantize(tiny_llama(), kind)
    # bitsandbytes' own evaluation on some CPUs wants sizes that are multiples of its blocks: stay in training mode
    before, base_logits = weights_of(base), logits(base.train())
    model = with_adapter(base)
    adapted = logits(model)
    assert not torch.equal(adapted, base_logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    model.merge_adapter()
    assert not torch.equal(logits(model), base_logits)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantize(tiny_llama(), kind), tmp_path)
    assert torch.equal(logits(again.train()), adapted)
    model.unload()
    assert same_weights(base, before)
    assert torch.equal(logits(base), base_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_requantized_sum(kind):
    model = with_adapter(quantize(tiny_llama(), kind))
    layer = next(iter(adapted_layers(model).values()))
    total = layer.get_base_weight().float() + layer.get_delta_weight("default").float()
    layer.merge()
    got = dequantize_module_weight(layer.get_base_layer()).float()
    expected = dequantize_module_weight(quantized_layer(total, None, kind, torch.float32)).float()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_salience_and_training_after_an_evaluation(kind):
    """bitsandbytes repacks 4-bit weights for some CPUs in the first evaluation; they must stay readable."""
    model = get_peft_model(quantize(tiny_llama(), kind), SpftConfig(density=0.05, samples=4))
    model.eval()
    logits(model)
    model.train()
    select_mask(model, [token_batch(rows=4)])
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
        logits(model)
        model.train()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_that_of_the_dequantized_model(kind):
    base = quantize(tiny_llama(), kind)
    plain = get_peft_model(dequantized(base), SpftConfig(density=0.02, samples=4))
    model = get_peft_model(base, SpftConfig(density=0.02, samples=4))
    for one in (model, plain):
        select_mask(one, [token_batch(rows=4)])
    shared = total = 0
    for one, other in zip(adapted_layers(model).values(), adapted_layers(plain).values(), strict=True):
        first, second = (set(layer.storage_positions(layer.mask("default")).tolist()) for layer in (one, other))
        shared, total = shared + len(first & second), total + len(first)
    # scores that differ by rounding may change places at the threshold
    assert shared >= (0.99 if kind != "8bit" else 0.9) * total


def test_an_empty_layer_under_zero3_keeps_nothing_of_its_weight(monkeypatch):
    monkeypatch.setattr("axolotl_spft.tuner.base_weight.is_deepspeed_zero3_enabled", lambda: True)
    layer = SpftLinear(quantize(tiny_llama(), "4bit").model.layers[0].mlp.up_proj, "default")
    x = torch.randn(3, layer.in_features, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert kept == []
    y.square().sum().backward()
    weight = layer.get_base_weight().to(x.dtype)
    torch.testing.assert_close(y, x.detach() @ weight.t())
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)


def test_nothing_dequantized_is_kept_for_backward():
    model = with_adapter(quantize(tiny_llama(), "4bit"))
    sizes = {layer.out_features * layer.in_features for layer in adapted_layers(model).values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**token_batch())
    shapes = {tuple(t.shape) for t in kept if t.is_floating_point() and t.numel() in sizes}
    weights = {(layer.out_features, layer.in_features) for layer in adapted_layers(model).values()}
    assert not shapes & weights


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_embedding_and_a_head_of_a_quantized_base(tmp_path, tied):
    """They stay in floating point, beside products that are made of dequantized weights."""
    make, targets = partial(tiny_llama, tie_word_embeddings=tied), ["embed_tokens", "lm_head", "q_proj"]
    plain = dequantized(quantize(make(), "4bit"))
    model = with_adapter(quantize(make(), "4bit"), target_modules=targets, density=0.2)
    layers = adapted_layers(model)
    assert ("lm_head" in layers) != tied and layers["model.embed_tokens"].quantization_backend is None
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight += layer.get_delta_weight("default")
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    for _ in range(2):
        expected = backward(plain)
        assert abs(backward(model) - expected) <= 1e-4 * expected
        assert_gradients_equal(model, plain, 1e-4)
        model.zero_grad()
        plain.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantize(make(), "4bit"), tmp_path)
    assert torch.equal(logits(loaded.train()), logits(model))
