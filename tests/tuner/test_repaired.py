"""Adapters that put a quantized weight's original entries back: several, sums, merges, state dicts, training."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from axolotl_spft import SparseAdamW, SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import mask_from_positions, positions
from axolotl_spft.ops.weight.scatter import assign_sum_
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.load import record_mask
from tests.interpreter import DEVICE
from tests.models import logits, tiny_llama, token_batch
from tests.test_oracle_training import dense_masks, train
from tests.tuner.test_quantized import dequantized, quantize

WEIGHTS = {name: module.weight.detach() for name, module in tiny_llama().named_modules() if "_proj" in name}


def with_repair(model: nn.Module, adapter: str = "default", seed: int = 0, repairs: bool = True, scale: float = 0.01):
    """The model with an adapter on random positions, that repairs its base, with random values."""
    config = SpftConfig(density=0.1)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
    else:
        model = get_peft_model(model, config, adapter)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted_layers(model).items():
        entries = layer.out_features * layer.in_features
        at = torch.randperm(entries, generator=generator)[: entries // 10].sort().values
        values = scale * torch.randn(len(at), generator=generator)
        originals = WEIGHTS[name].reshape(-1).cpu()[at] if repairs else None
        layer.set_mask(adapter, mask_from_positions(at, layer.out_features, layer.in_features), values, originals)
    record_mask(model.base_model, adapter, None)
    return model


def expected_weights(model, adapters: dict[str, bool]) -> dict[str, torch.Tensor]:
    """By layer Q, with W where any adapter (name -> whether it repairs) repairs it, plus all values: float64."""
    weights = {}
    for name, layer in adapted_layers(model).items():
        weight = layer.quantization_backend.get_base_weight(layer.get_base_layer()).double().reshape(-1)
        for adapter in (adapter for adapter, repairs in adapters.items() if repairs):
            at = positions(layer.mask(adapter), layer.in_features)
            weight[at] = WEIGHTS[name].to(DEVICE).double().reshape(-1)[at]
        for adapter in adapters:
            at = positions(layer.mask(adapter), layer.in_features)
            weight[at] += layer.values(adapter).detach().double()
        weights[name] = weight.view(layer.out_features, layer.in_features)
    return weights


def plain_logits(model, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the base with these weights in plain layers."""
    plain = tiny_llama()
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    return logits(plain)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_originals_are_put_back_once_and_deviations_add_up(kind):
    model = with_repair(quantize(tiny_llama(), kind))
    with_repair(model, "second", 1)
    with_repair(model, "plain", 2, repairs=False)
    repairs = {"default": True, "second": True, "plain": False}
    for names in (["default"], ["plain"], ["default", "second"], ["default", "plain"], list(repairs)):
        model.base_model.set_adapter(names)
        wanted = plain_logits(model, expected_weights(model, {name: repairs[name] for name in names}))
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=2e-5)
        several = logits(model)
        if len(names) > 1:
            model.add_weighted_adapter(names, [1.0] * len(names), "sum")
            model.set_adapter("sum")
            torch.testing.assert_close(logits(model), several, rtol=1e-5, atol=2e-5)
            model.delete_adapter("sum")
    model.base_model.set_adapter(list(repairs))
    several, expected = logits(model), expected_weights(model, repairs)
    model.merge_adapter()
    for name, layer in adapted_layers(model).items():
        found = layer.quantization_backend.get_base_weight(layer.get_base_layer())
        # but for quantizing the sum anew
        error = (found - expected[name]).norm() / expected[name].norm()
        assert error < (0.12 if kind == "4bit" else 0.02), name
    model.unmerge_adapter()
    assert torch.equal(logits(model), several)
    model.merge_adapter(["plain"])
    with pytest.raises(SpftError, match=r"`default` repairs the quantized base and \['plain'\] is merged already"):
        model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), several)


def test_rows_of_a_batch_have_the_repair_of_their_own_adapter():
    model = with_repair(quantize(tiny_llama(), "4bit"))
    with_repair(model, "plain", 2, repairs=False).eval()
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=["default", "plain"]).logits
        for row, name in enumerate(("default", "plain")):
            model.set_adapter(name)
            torch.testing.assert_close(together[row], model(input_ids=ids).logits[row], rtol=1e-4, atol=1e-4)


def test_one_step_of_merging_is_the_quantized_sum():
    model = with_repair(quantize(tiny_llama(), "4bit"))
    expected = expected_weights(model, {"default": True})
    for name, layer in adapted_layers(model).items():
        total = expected[name].float()
        layer.merge()
        found = layer.quantization_backend.get_base_weight(layer.get_base_layer())
        holder = quantize(nn.ModuleDict({"x": _linear(total)}), "4bit")["x"]
        assert torch.equal(found, layer.quantization_backend.get_base_weight(holder)), name


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data.copy_(weight)
    return linear


def test_copies_state_dicts_files_and_moves_keep_the_originals(tmp_path):
    model = with_repair(quantize(tiny_llama(), "4bit"))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    stream = io.BytesIO()
    torch.save({name: tensor for name, tensor in model.state_dict().items() if "spft_" in name}, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    assert sum("spft_originals" in name for name in state) == len(adapted_layers(model))
    # over another mask, over an adapter that repairs nothing, and back to one that does not
    for other in (with_repair(quantize(tiny_llama(), "4bit"), seed=5), with_repair(
        quantize(tiny_llama(), "4bit"), repairs=False
    )):  # fmt: skip
        other.load_state_dict(state, strict=False)
        assert torch.equal(logits(other), expected)
    plain = {name: tensor for name, tensor in state.items() if "spft_originals" not in name}
    other.load_state_dict(plain, strict=False)
    assert not torch.equal(logits(other), expected)
    assert all(layer.originals("default") is None for layer in adapted_layers(other).values())
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert not any("spft_originals" in name for name in model.state_dict())
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


def test_a_layer_whose_entries_cannot_be_replaced_refuses_them():
    model = with_repair(quantize(tiny_llama(), "4bit"), repairs=False)
    layer = next(iter(adapted_layers(model).values()))
    layer.quantization_backend.supports_merge = False
    originals = torch.zeros(layer.mask("default").nnz)
    repaired = next(iter(adapted_layers(with_repair(quantize(tiny_llama(), "4bit"))).values()))
    with pytest.raises(SpftError, match="with other positions it needs what the weight was"):
        repaired.set_mask("default", layer.mask("default"))
    with pytest.raises(SpftError, match=r"entries of a bnb 4bit layer cannot be replaced.*axolotl spft merge"):
        layer.set_mask("default", layer.mask("default"), originals=originals)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_plain_weights(compiled):
    base = quantize(tiny_llama(), "4bit")
    model = with_repair(base)
    weights = expected_weights(model, {"default": True})
    plain = tiny_llama()
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    plain(**token_batch()).loss.backward()
    if compiled:
        layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
        layer.compile(backend="aot_eager", fullgraph=True)
    model(**token_batch()).loss.backward()
    for name, layer in adapted_layers(model).items():
        at = positions(layer.mask("default"), layer.in_features)
        wanted = plain.get_submodule(name).weight.grad.reshape(-1)[at]
        got = layer.values("default").grad
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_assigning_rounds_the_sum_once(backend, dtypes, transposed):
    dtype, originals_dtype = dtypes
    torch.manual_seed(0)
    at = torch.randperm(7 * 13)[:40].sort().values
    mask = mask_from_positions(at, 7, 13)
    mask = type(mask)(*(part.to(DEVICE) for part in mask))
    weight = torch.full((13, 7) if transposed else (7, 13), torch.nan, dtype=dtype, device=DEVICE)
    originals, values = torch.randn(40, device=DEVICE).to(originals_dtype), torch.randn(40, device=DEVICE)
    assign_sum_(weight, mask, originals, values, transposed, backend)
    found = (weight.t() if transposed else weight).reshape(-1)
    assert torch.equal(found[at], (originals.float() + values).to(dtype))
    assert found.isnan().sum() == 7 * 13 - 40


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_training_is_masked_dense_training_of_the_repaired_model_with_decay_toward_its_start(weight_decay):
    base = quantize(tiny_llama(), "4bit")
    sparse = with_repair(base, scale=0.0)
    start = expected_weights(sparse, {"default": True})
    masks = dense_masks(sparse)
    dense = dequantized(quantize(tiny_llama(), "4bit"))
    for name, weight in start.items():
        dense.get_submodule(name).weight.data.copy_(weight)
    dense.requires_grad_(False)
    values = [parameter for parameter in sparse.parameters() if parameter.requires_grad]
    losses = train(sparse, values, SparseAdamW(values, lr=1e-2, weight_decay=weight_decay), 1)

    weights = {name: dense.get_submodule(name).weight for name in start}
    for weight in weights.values():
        weight.requires_grad_(True)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    deltas = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in weights.items()}
    reference = torch.optim.AdamW(deltas.values(), lr=1e-2, weight_decay=weight_decay)

    def masked_gradients() -> None:
        for name, weight in weights.items():
            deltas[name].grad = weight.grad * masks[f"{name}.weight"]
            weight.grad = None

    def write_weights(*_) -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name] + deltas[name])

    reference.register_step_post_hook(write_weights)
    expected_losses = train(dense, deltas.values(), reference, 1, masked_gradients)
    for name, weight in expected_weights(sparse, {"default": True}).items():
        moved = (weights[name].detach() - before[name])[masks[f"{name}.weight"]]
        assert moved.abs().max() > 1e-3
        assert (weight - weights[name]).abs().max() <= 1e-5 * weights[name].abs().max(), name
    assert losses == pytest.approx(expected_losses, rel=1e-5)
