"""Saved adapters: what the file holds, loading bit for bit, and damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftFileError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.state import base_shapes_of, shapes_fingerprint
from tests.models import ARCHITECTURES, logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def trained_adapter(model=None, **options) -> PeftModel:
    model = get_peft_model(model or tiny_llama(), SpftConfig(**({"density": 0.1, "samples": 2} | options)))
    select_mask(model, [token_batch()])
    with torch.no_grad():
        for number, layer in enumerate(adapted_layers(model).values()):
            values = layer.spft_values["default"]
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(number)))
    return model


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(tmp_path, architecture, dtype, low_cpu_mem_usage):
    model = trained_adapter(ARCHITECTURES[architecture](dtype))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    again = PeftModel.from_pretrained(ARCHITECTURES[architecture](dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), expected)
    for one, other in zip(adapted_layers(model).values(), adapted_layers(again).values(), strict=True):
        assert one.spft_values["default"].dtype == other.spft_values["default"].dtype
        assert torch.equal(one.spft_values["default"], other.spft_values["default"])
        assert not other.spft_values["default"].requires_grad
    assert same_weights(again.unload(), weights_of(ARCHITECTURES[architecture](dtype)))


def test_the_file_holds_the_contract(tmp_path):
    model = trained_adapter()
    model.save_pretrained(tmp_path)
    layers = adapted_layers(model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.{tensor}"
        for name in layers
        for tensor in ("spft_values", "spft_columns", "spft_row_offsets")
    }
    for name, layer in layers.items():
        values, columns, row_offsets = (
            tensors[f"base_model.model.{name}.{t}"] for t in ("spft_values", "spft_columns", "spft_row_offsets")
        )
        assert columns.dtype == torch.uint16
        assert row_offsets.dtype == torch.int32
        assert values.shape == columns.shape
        assert row_offsets.shape == (layer.out_features + 1,)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPFT"
    assert config["nnz"] == sum(layer.mask("default").nnz for layer in layers.values())
    assert config["mask_source"] == {"salience": "gradient", "scope": "layer", "samples": 2, "seed": 0}
    lines = [f"{name} {layer.out_features} {layer.in_features}" for name, layer in layers.items()]
    import hashlib

    assert config["base_shapes"] == hashlib.sha256("\n".join(lines).encode()).hexdigest() == base_shapes_of(layers)


def test_columns_of_a_wide_layer_are_int32(tmp_path):
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(2**16 + 3, 2, bias=False))
    model = with_adapter(wide, target_modules=["0"], num_values=50, density=None)
    layer = next(iter(adapted_layers(model).values()))
    assert layer.mask("default").columns.dtype == torch.int32
    x = torch.randn(3, 2**16 + 3)
    expected = x @ (layer.get_base_weight() + layer.get_delta_weight("default")).t()
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(torch.nn.Sequential(wide[0].get_base_layer()), tmp_path)
    assert torch.equal(model(x), again(x))


def test_fingerprint_depends_on_names_shapes_and_order():
    shapes = [("a", 2, 3), ("b", 4, 5)]
    prints = {shapes_fingerprint(s) for s in (shapes, shapes[::-1], [("a", 3, 2), ("b", 4, 5)], [("a", 2, 3)])}
    assert len(prints) == 4


def test_loading_beside_another_adapter(tmp_path):
    first, second = trained_adapter(), trained_adapter(salience="magnitude", density=0.03)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    both = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(both), logits(first))
    both.set_adapter("second")
    assert torch.equal(logits(both), logits(second))


def test_loaded_for_training(tmp_path):
    trained_adapter().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    loss = again(**token_batch()).loss
    loss.backward()
    assert all(layer.spft_values["default"].grad.abs().max() > 0 for layer in adapted_layers(again).values())


def swapped(columns: torch.Tensor) -> torch.Tensor:
    return columns.int().flip(0).to(columns.dtype)


DAMAGES = {
    "values missing": ({".spft_values": None}, "spft_values missing"),
    "columns missing": ({".spft_columns": None}, "spft_columns missing"),
    "fewer values": ({".spft_values": lambda t: t[:-1].clone()}, "columns but"),
    "unsorted": ({".spft_columns": swapped}, "columns must ascend"),
    "out of range": ({".spft_columns": lambda t: torch.full_like(t.int(), 36).to(torch.uint16)}, "outside 0..35"),
    "columns of another type": ({".spft_columns": lambda t: t.long()}, "columns are torch.int64"),
    "offsets of another type": ({".spft_row_offsets": lambda t: t.long()}, "row offsets are torch.int64"),
    "offsets of another length": ({".spft_row_offsets": lambda t: t[:-1].clone()}, "must be out_features + 1 = 37"),
    "falling offsets": ({".spft_row_offsets": lambda t: t.flip(0).contiguous()}, "row offsets must rise"),
    "NaN": ({".spft_values": lambda t: t * float("nan")}, "NaN or infinite"),
    "infinite": ({".spft_values": lambda t: t * float("inf")}, "NaN or infinite"),
    "integer values": ({".spft_values": lambda t: t.int()}, "must be floating point"),
    "two dimensions": ({".spft_values": lambda t: t[None]}, "must each have one dimension"),
}


def damage(folder, changes):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for ending, change in changes.items():
        key = FIRST + ending
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize("onto", ["base", "another adapter"])
def test_a_damaged_file_is_one_clear_error_and_changes_nothing(tmp_path, kind, onto):
    changes, part = DAMAGES[kind]
    trained_adapter().save_pretrained(tmp_path / "bad")
    damage(tmp_path / "bad", changes)
    base = tiny_llama()
    model = base
    if onto == "another adapter":
        trained_adapter(density=0.02).save_pretrained(tmp_path / "good")
        model = PeftModel.from_pretrained(base, tmp_path / "good")
    before, names, state = logits(model), [n for n, _ in model.named_modules()], weights_of(model)
    with pytest.raises(SpftFileError) as caught:
        if onto == "base":
            PeftModel.from_pretrained(model, tmp_path / "bad")
        else:
            model.load_adapter(tmp_path / "bad", adapter_name="bad")
    assert "layers.0.self_attn.q_proj" in str(caught.value)
    assert part in str(caught.value)
    assert "Load it on the base model it was trained on, with an intact copy" in str(caught.value)
    assert [n for n, _ in model.named_modules()] == names
    assert same_weights(model, state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("other", "targets", "part"),
    [
        ({"hidden_size": 40}, "all-linear", "row offsets, must be out_features + 1"),
        ({"intermediate_size": 60}, "all-linear", "layers.0.mlp.gate_proj: 51 row offsets"),
        # the mask would fit into the wider matrix
        ({"intermediate_size": 60}, ["down_proj"], "names or shapes are not those"),
        ({"num_hidden_layers": 3}, ["q_proj"], "q_proj: spft_values, spft_columns, spft_row_offsets missing"),
        ({"num_hidden_layers": 1}, "all-linear", "the model has no such targeted module"),
        ({"num_hidden_layers": 0}, ["lm_head", "q_proj"], "the model has no such targeted module"),
    ],
)
def test_a_file_of_another_base_model_is_refused(tmp_path, other, targets, part):
    trained_adapter(target_modules=targets).save_pretrained(tmp_path)
    base = tiny_llama(**other)
    before = weights_of(base)
    with pytest.raises(SpftFileError) as caught:
        PeftModel.from_pretrained(base, tmp_path)
    assert part in str(caught.value)
    assert same_weights(base, before)


def test_the_number_of_values_must_be_the_one_that_the_config_records(tmp_path):
    trained_adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nnz": 7}))
    with pytest.raises(SpftFileError, match="config records nnz: 7"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_truncated_file_changes_nothing(tmp_path):
    trained_adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(SpftFileError, match="not a complete safetensors file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
