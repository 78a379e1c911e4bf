"""Saved adapters as plain tensors."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter, read_adapter, write_adapter
from axolotl_spft.checkpoint.shira import write_shira
from axolotl_spft.errors import SpftFileError
from tests.models import logits, tiny_gpt2, tiny_llama, with_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = with_adapter(tiny_llama(), modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    model.save_pretrained(folder)
    return model, folder


def test_an_adapter_is_read_and_written_without_a_model(saved, tmp_path):
    model, folder = saved
    adapter = read_adapter(folder)
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "spft_values")}
    assert adapter.deltas.keys() == layers.keys() and adapter.others.keys() == {"lm_head.weight"}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    adapter = read_adapter(folder, shapes)
    assert list(adapter.deltas) == list(layers) and adapter.nnz == adapter.config["nnz"]
    for name, layer in layers.items():
        assert adapter.deltas[name].shape == shapes[name]
        assert torch.equal(adapter.deltas[name].values, layer.spft_values["default"])
    write_adapter(tmp_path, adapter)
    again = read_adapter(tmp_path)
    assert {name: delta.shape for name, delta in again.deltas.items()} == shapes
    written = load_file(tmp_path / WEIGHTS_FILE)
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        assert torch.equal(written[key].int(), tensor.int()) and written[key].dtype == tensor.dtype
    # what PEFT reads is the same adapter
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), logits(model))


def test_in_features_are_the_least_that_fit_where_nothing_tells_them(tmp_path):
    model = with_adapter(tiny_gpt2(), target_modules=["c_fc"])
    model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    save_file({key: value for key, value in load_file(path).items() if "record" not in key}, path)
    adapter = read_adapter(tmp_path)
    assert not adapter.has_shapes
    for name, delta in adapter.deltas.items():
        layer = model.base_model.model.get_submodule(name)
        assert delta.shape == (layer.out_features, int(layer.mask("default").columns.int().max()) + 1)


def _change(tmp_path, saved, key, tensor):
    _, folder = saved
    tensors = load_file(folder / WEIGHTS_FILE)
    names = [name for name in tensors if name.endswith(key)]
    if tensor is None:
        del tensors[names[0]]
    else:
        tensors[names[0] if names else key] = tensor(tensors[names[0]]) if names else tensor(None)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text())


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        ("spft_columns", None, "spft_columns missing"),
        ("spft_columns", lambda columns: columns.to(torch.int32), "columns are torch.int32|spft_columns missing"),
        ("spft_row_offsets", lambda offsets: offsets.flip(0), "row offsets must rise"),
        ("spft_values", lambda values: values * float("nan"), "NaN"),
        ("spft_values", lambda values: values[1:], "values"),
        ("strange", lambda _: torch.zeros(1), "no tensor of a saved adapter has such a name"),
        ("base_model.spft_record", lambda _: torch.zeros(3, dtype=torch.uint8), r"record .* is damaged"),
    ],
)
def test_a_damaged_adapter_is_one_clear_error(saved, tmp_path, key, tensor, message):
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in saved[0].base_model.model.named_modules()
        if hasattr(module, "spft_values")
    }
    _change(tmp_path, saved, key, tensor)
    with pytest.raises(SpftFileError, match=message):
        read_adapter(tmp_path, shapes)


def test_other_kinds_and_missing_files_are_named(saved, tmp_path):
    with pytest.raises(SpftFileError, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(SpftFileError, match="`peft_type: LORA` must be SPFT"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text((saved[1] / CONFIG_FILE).read_text())
    with pytest.raises(SpftFileError, match="not a complete safetensors file"):
        read_adapter(tmp_path)
    _change(tmp_path, saved, "spft_values", lambda values: values)
    with pytest.raises(SpftFileError, match="the base model has no such module"):
        read_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (1, 1)})


def test_an_error_leaves_the_adapter_of_before(saved, tmp_path):
    adapter = read_adapter(saved[1])
    write_adapter(tmp_path, adapter)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_adapter(tmp_path, SavedAdapter({"unwritable": object()}, adapter.deltas))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [write_adapter, write_shira])
def test_a_folder_that_takes_no_more_is_one_clear_error(saved, tmp_path, write):
    adapter = read_adapter(saved[1])
    (tmp_path / "file").touch()
    with pytest.raises(SpftFileError, match=r"file.out.* cannot be written .*free some room there, or name another"):
        write(tmp_path / "file/out", adapter)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, soft[1]))
    try:
        with pytest.raises(SpftFileError, match="free some room there, or name another folder"):
            write(tmp_path / "out", adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert list((tmp_path / "out").iterdir()) == []
