"""Base checkpoints read under the names of the model."""

from __future__ import annotations

import json
import shutil
import struct

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_spft.checkpoint.base import BaseCheckpoint, check_unquantized
from axolotl_spft.checkpoint.shards import INDEX_FILE, Shards, find_checkpoint
from axolotl_spft.checkpoint.skeleton import linear_shapes, skeleton
from axolotl_spft.errors import SpftFileError
from tests.checkpoint.saved import BASES, save_base
from tests.models import tiny_gpt2, tiny_llama, with_adapter


@pytest.mark.parametrize("name", BASES)
def test_every_parameter_is_what_transformers_loads(tmp_path, name):
    base = save_base(tmp_path, BASES[name])
    model = AutoModelForCausalLM.from_pretrained(base)
    checkpoint = BaseCheckpoint(base, skeleton(base))
    for parameter, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read_parameter(checkpoint.keys.tied.get(parameter, parameter)), tensor)
    shapes = linear_shapes(model)
    assert checkpoint.missing([*shapes, "nothing"]) == ["nothing"]
    for module, shape in shapes.items():
        weight = checkpoint.read_matrix(module)
        assert tuple(weight.shape) == shape
        assert torch.equal(
            weight.t() if name == "gpt2" and "h." in module else weight, model.get_submodule(module).weight
        )
        for rows in ((0, 1), (3, 9), (2, 2), (5, 10**6)):
            assert torch.equal(checkpoint.read_rows(module, *rows), weight[slice(*rows)])
    with pytest.raises(SpftFileError, match="no weight for the module nothing"):
        checkpoint.read_matrix("nothing")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_names_are_those_of_a_quantized_and_adapted_model(tmp_path, make):
    base = save_base(tmp_path, make)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(base, quantization_config=settings))
    checkpoint, plain = BaseCheckpoint(base, model.get_base_model()), BaseCheckpoint(base, skeleton(base))
    for module, shape in linear_shapes(make()).items():
        assert torch.equal(checkpoint.read_matrix(module), plain.read_matrix(module))
        assert tuple(checkpoint.read_rows(module, 1, 4).shape) == (3, shape[1])


def test_damaged_and_quantized_checkpoints_are_refused(tmp_path):
    base = save_base(tmp_path, tiny_llama)
    index = json.loads((base / INDEX_FILE).read_text())
    key, file = next(iter(index["weight_map"].items()))
    for weight_map, message in (
        ({**index["weight_map"], key: "../outside.safetensors"}, "must be a file of the folder"),
        ({**index["weight_map"], "absent": file}, "does not hold it"),
        (None, "`weight_map` must say"),
    ):
        (base / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SpftFileError, match=message):
            Shards(base)
    (base / INDEX_FILE).write_text(json.dumps(index))
    tensors = load_file(base / file)
    save_file(tensors | {key: torch.zeros(3, dtype=torch.uint8)}, base / file)
    with pytest.raises(SpftFileError, match="was saved quantized"):
        BaseCheckpoint(base, tiny_llama())
    (base / INDEX_FILE).unlink()
    with pytest.raises(SpftFileError, match=r"holds neither model\.safetensors nor"):
        Shards(base)


@pytest.mark.parametrize("dtype, size", [("F4", 8), ("F8_E8M0", 16)])
def test_a_checkpoint_of_a_dtype_that_torch_may_not_know_is_a_quantized_one(tmp_path, dtype, size):
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(SpftFileError, match=r"was saved quantized \(a\.weight\)"):
        check_unquantized(Shards(tmp_path))
    with pytest.raises(SpftFileError, match=f"a.weight has the dtype {dtype}"):
        Shards(tmp_path).read("a.weight")


def test_a_cache_of_the_hub_that_holds_a_part_is_filled(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", tiny_llama)
    snapshot = tmp_path / "hub/models--of--us/snapshots" / ("0" * 40)
    (tmp_path / "hub/models--of--us/refs").mkdir(parents=True)
    (tmp_path / "hub/models--of--us/refs/main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    # whoever reads the config of a model of the hub puts it alone into the cache
    shutil.copy(base / "config.json", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    from_cache, reachable = huggingface_hub.snapshot_download, False

    def snapshot_download(*args, local_files_only, allow_patterns, **kwargs):
        if not local_files_only:
            if not reachable:
                raise OSError("no network")
            for pattern in allow_patterns:
                for path in base.glob(pattern):
                    shutil.copy(path, snapshot)
        return from_cache(*args, local_files_only=True, allow_patterns=allow_patterns, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_checkpoint("of/us", weights=False) == snapshot
    with pytest.raises(SpftFileError, match=r"of/us is neither .*no network; .*has not all of its weights"):
        find_checkpoint("of/us")
    reachable = True
    for _ in range(2):
        assert Shards(find_checkpoint("of/us")).file_of == Shards(base).file_of
        next(snapshot.glob("*.safetensors")).unlink()
    assert find_checkpoint("of/us", companions=True) == snapshot
    # whoever loads the weights alone leaves the rest out of the cache
    (snapshot / "chat_template.jinja").unlink()
    reachable = False
    assert find_checkpoint("of/us", companions=True) == snapshot and not (snapshot / "chat_template.jinja").exists()
    reachable = True
    find_checkpoint("of/us")
    assert not (snapshot / "chat_template.jinja").exists()
    find_checkpoint("of/us", companions=True)
    assert (snapshot / "chat_template.jinja").exists()
    next(snapshot.glob("*.safetensors")).unlink()
    reachable = False
    with pytest.raises(SpftFileError, match="has not all of its weights"):
        find_checkpoint("of/us")
