"""Saved adapters: what the file holds, loading bit for bit, and damaged files."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.config import RECORDED, mask_option_names
from axolotl_spft.errors import SpftFileError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.record import FILE_KEY, record_of
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
    } | {"base_model.spft_record"}
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
        ({"intermediate_size": 60}, ["down_proj"], "shape (36, 50), but this model's has (36, 60)"),
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


def test_an_older_file_without_a_record(tmp_path):
    model = trained_adapter(target_modules=["down_proj"])
    model.save_pretrained(tmp_path)
    without_record(tmp_path)
    with pytest.raises(SpftFileError, match="names or shapes are not those that the adapter's config records"):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=60), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert recorded(again) == recorded(model)
    # and from now on it has one
    again.save_pretrained(tmp_path / "again")
    assert record_in(tmp_path / "again") == record_in_model(model) | {"trained_on": {}}


def without_record(folder) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != FILE_KEY}, path)


def record_in(folder) -> dict:
    return record_of(load_file(folder / "adapter_model.safetensors"))


def record_in_model(model) -> dict:
    return record_of({FILE_KEY: model.base_model.spft_record["default"]})


def recorded(model) -> dict:
    config = model.peft_config["default"]
    return {name: getattr(config, name) for name in (*RECORDED, *mask_option_names())}


def test_what_is_recorded_is_what_is_installed(tmp_path):
    """After loading over an adapter of another mask, and into one without a mask; also by a whole model's state."""
    made = trained_adapter(salience="balanced", scope="row", samples=3, seed=5, density=None, num_values=700)
    made.save_pretrained(tmp_path / "made")
    expected = recorded(made)
    assert expected["mask_source"] == {"salience": "balanced", "scope": "row", "samples": 2, "seed": 5}
    assert (expected["samples"], expected["nnz"]) == (3, 700)
    other, empty = trained_adapter(density=None, num_values=700), get_peft_model(tiny_llama(), SpftConfig())
    for number, onto in enumerate([other, empty]):
        if number:
            onto.load_state_dict(made.state_dict())
        else:
            assert recorded(onto) != expected
            onto.load_adapter(tmp_path / "made", "default", is_trainable=True)
        assert recorded(onto) == expected
        onto.save_pretrained(tmp_path / "onto")
        assert record_in(tmp_path / "onto") == record_in(tmp_path / "made")
        config = json.loads((tmp_path / "onto" / "adapter_config.json").read_text())
        assert {name: config[name] for name in expected} == expected


def test_an_older_file_over_another_mask_leaves_no_false_source(tmp_path):
    trained_adapter(salience="balanced", density=None, num_values=700).save_pretrained(tmp_path)
    without_record(tmp_path)
    model = trained_adapter(density=None, num_values=700)
    before = recorded(model)
    model.load_adapter(tmp_path, "default")
    assert recorded(model) == before | {"mask_source": None}
    assert record_in_model(model)["mask_source"] is None


def test_records_of_several_adapters_and_of_sums(tmp_path):
    model = trained_adapter()
    model.add_adapter("other", SpftConfig(init_weights=False, density=0.05))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum")
    model.save_pretrained(tmp_path)
    sources = [record_in(tmp_path / folder)["mask_source"] for folder in (".", "other", "sum")]
    assert sources == [recorded(model)["mask_source"], None, {"sum of": {"default": 1.0, "other": 0.5}}]
    model.delete_adapter("other")
    assert set(model.base_model.spft_record) == {"default", "sum"}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")
    again.load_adapter(tmp_path / "other", "second")
    assert again.peft_config["default"].mask_source == sources[2]
    assert record_of({FILE_KEY: again.base_model.spft_record["second"]})["options"]["density"] == 0.05


def test_a_random_adapter_that_was_saved_is_compared_with_its_config(tmp_path):
    with_adapter(tiny_llama()).save_pretrained(tmp_path)
    damage(tmp_path, {".spft_values": lambda t: t[:-1].clone()})
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(SpftFileError, match="columns but"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names


def test_a_damaged_record_is_one_clear_error(tmp_path):
    trained_adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {FILE_KEY: torch.zeros(3, dtype=torch.uint8)}, path)
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(SpftFileError, match=r"record .* is damaged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names


class Net(nn.Module):
    def __init__(self, width: int, names: tuple[str, str] = ("lin0", "lin1")):
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        self.add_module(names[0], nn.Linear(5, width))
        self.add_module(names[1], nn.Linear(width, 3))

    def forward(self, x):
        return getattr(self, self.names[1])(torch.relu(getattr(self, self.names[0])(x)))


def saved_net(folder, **options) -> PeftModel:
    model = get_peft_model(Net(7), SpftConfig(**({"target_modules": ["lin0"], "num_values": 6} | options)))
    select_mask(model, [{"x": torch.ones(2, 5)}], lambda model, batch: model(**batch).square().sum())
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.spft_values["default"].normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("saved", [["lin1"], None], ids=["modules_to_save", "none"])
def test_a_refused_file_leaves_the_base_as_it_was(tmp_path, saved):
    saved_net(tmp_path, modules_to_save=saved)
    base = Net(9)
    before, modules = weights_of(base), {name: module for name, module in base.named_modules()}
    with pytest.raises(SpftFileError, match="lin0: 8 row offsets, must be out_features"):
        PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules
    assert same_weights(base, before)


def test_a_refused_file_leaves_the_other_adapter_as_it_was(tmp_path):
    saved_net(tmp_path / "bad", modules_to_save=["lin1"])
    damage_net = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(damage_net)
    tensors["base_model.model.lin0.spft_values"] *= float("nan")
    save_file(tensors, damage_net)
    saved_net(tmp_path / "good", modules_to_save=["lin1"])
    model = PeftModel.from_pretrained(Net(7), tmp_path / "good")
    x = torch.ones(2, 5)
    before, state = model(x), weights_of(model)
    with pytest.raises(SpftFileError, match="NaN or infinite"):
        model.load_adapter(tmp_path / "bad", "bad")
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(x), before)
    assert same_weights(model, state)


@pytest.mark.parametrize("targets", [["lin0", "lin1"], "all-linear"])
@pytest.mark.parametrize("older", [False, True])
def test_modules_that_were_renamed_since(tmp_path, targets, older):
    model, x = saved_net(tmp_path, target_modules=targets), torch.linspace(-1, 1, 10).view(2, 5)
    if older:
        without_record(tmp_path)
    renamed = Net(7, ("first", "last"))
    renamed._checkpoint_conversion_mapping = {"^lin0": "first", "^lin1": "last"}
    if targets == ["lin0", "lin1"]:
        # as PEFT's own methods need it
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["first", "last"]}))
    caught = pytest.warns(UserWarning, match="cannot be checked") if older else nullcontext()
    with caught:
        again = PeftModel.from_pretrained(renamed, tmp_path)
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "again")
    assert list(record_in(tmp_path / "again")["shapes"]) == ["first", "last"]


def test_a_renamed_model_of_another_width_is_refused(tmp_path):
    saved_net(tmp_path, target_modules=["lin1"])
    renamed = Net(8, ("first", "last"))
    renamed._checkpoint_conversion_mapping = {"^lin0": "first", "^lin1": "last"}
    with pytest.raises(SpftFileError, match="shapes are not those that the file records"):
        PeftModel.from_pretrained(renamed, tmp_path)


def test_as_shira_loads_under_a_key_mapping(tmp_path):
    """The values of SHiRA's adapter and of ours, trained under the old names, are the same under the new ones."""
    from peft import ShiraConfig

    shira = get_peft_model(Net(7), ShiraConfig(target_modules=["lin0"], r=1, init_weights=False))
    shira.save_pretrained(tmp_path / "shira")
    ours, mapping = saved_net(tmp_path / "ours"), {"^lin0": "first"}
    for name in ("shira", "ours"):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["first"]}))
    x = torch.linspace(-1, 1, 10).view(2, 5)
    for name, model in {"shira": shira, "ours": ours}.items():
        again = PeftModel.from_pretrained(Net(7, ("first", "last")), tmp_path / name, key_mapping=mapping)
        assert torch.equal(again(x), model(x))


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
