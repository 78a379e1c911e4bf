"""Merges of adapters on experts, whose checkpoints hold a tensor of each expert, or of all."""

from __future__ import annotations

import json
import shutil
from math import prod

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.keys import KeyMap
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.shards import INDEX_FILE, Shards
from axolotl_spft.checkpoint.shira import write_shira
from axolotl_spft.checkpoint.skeleton import module_shapes, skeleton
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.inspection.inspect import inspect_files
from axolotl_spft.ops.weight.stacked import as_matrix
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.serving import apply_adapter
from tests.checkpoint.saved import merged_in_memory, save_adapter, save_base
from tests.experts import EXPERT_MODELS, PARAMETERS


def base_of(tmp_path, family: str):
    return save_base(tmp_path / "base", lambda dtype: EXPERT_MODELS[family]("eager", dtype))


@pytest.mark.parametrize("family", list(EXPERT_MODELS))
def test_a_streamed_merge_is_the_merge_in_memory(tmp_path, family):
    base = base_of(tmp_path, family)
    by_expert = any(".experts.0." in key for key in Shards(base).file_of)
    assert by_expert == (family != "gpt_oss")
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=PARAMETERS)
    saved = read_adapter(adapter)
    experts = [name for name in saved.deltas if name.endswith(tuple(f".{each}" for each in PARAMETERS))]
    assert len(experts) == (2 if family == "deepseek_v3" else 4)
    assert json.loads((adapter / "adapter_config.json").read_text())["target_parameters"] == PARAMETERS
    model, plain = skeleton(base, saved.deltas), AutoModelForCausalLM.from_pretrained(base)
    assert module_shapes(model, saved.deltas) == {name: delta.shape for name, delta in saved.deltas.items()}
    for name in experts:
        matrix = BaseCheckpoint(base, model).read_matrix(name)
        assert torch.equal(matrix, as_matrix(plain.get_parameter(name), family == "gpt_oss"))
    report = merge(adapter, tmp_path / "merged", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expected = merged_in_memory(base, adapter)
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    assert Shards(tmp_path / "merged").file_of.keys() == Shards(base).file_of.keys()
    assert report["values"] == saved.nnz and report["matrices_measured"] == len(saved.deltas)
    # the merge changed the experts, at their values alone
    for name in experts:
        assert 0 < int((merged[name] != plain.state_dict()[name]).sum()) <= saved.deltas[name].mask.nnz
    # and they are inspected, measured against the base
    inspected = inspect_files([adapter], base)
    assert [figures.report.name for figures in inspected.figures[0]] == list(saved.deltas)
    # a sum of adapters is one on the same weights; SHiRA has no such thing
    doubled, _ = combine([saved, saved])
    write_adapter(tmp_path / "doubled", doubled)
    twice = PeftModel.from_pretrained(EXPERT_MODELS[family](), tmp_path / "doubled")
    for name, layer in adapted_layers(twice).items():
        assert torch.equal(layer.values("default"), 2 * saved.deltas[name].values.float())
    with pytest.raises(SpftFileError, match=r"`target_parameters: .*SHiRA adapts modules alone"):
        write_shira(tmp_path / "shira", saved)
    # an engine's model is not switched by it
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    with pytest.raises(SpftError, match=r"experts\.down_proj.*experts that are one parameter.*serve the merged model"):
        apply_adapter(plain, adapter)
    assert all(torch.equal(weight, before[name]) for name, weight in plain.state_dict().items())


def scattered(base, folder):
    """The checkpoint of a folder in five files, of which each has tensors of all layers and experts."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {key: tensor for path in base.glob("*.safetensors") for key, tensor in load_file(path).items()}
    files = [f"model-{part:05}-of-00005.safetensors" for part in range(1, 6)]
    place = {key: files[number % 5] for number, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: tensors[key] for key in tensors if place[key] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@pytest.fixture
def work(monkeypatch):
    """Counts the groups whose entries are looked for, and the bytes that are read of the base."""
    made, read = [], []
    places, read_tensor = KeyMap.places, Shards.read

    def counted(self, group):
        made.append(group.first_name)
        return places(self, group)

    def counted_bytes(self, key):
        tensor = read_tensor(self, key)
        read.append((key, tensor.nbytes))
        return tensor

    monkeypatch.setattr(KeyMap, "places", counted)
    monkeypatch.setattr(Shards, "read", counted_bytes)
    return made, read


@pytest.mark.parametrize("layout", ["by name", "scattered"])
def test_experts_are_merged_once_however_their_tensors_are_ordered(tmp_path, work, layout):
    made, read = work
    base = base_of(tmp_path, "mixtral")
    if layout == "scattered":
        base = scattered(base, tmp_path / "scattered")
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=PARAMETERS)
    expected = merged_in_memory(base, adapter)
    report = merge(adapter, tmp_path / "merged", base)
    changed = [key for key in Shards(base).file_of if ".experts." in key or "_proj." in key]
    assert sorted(made) == sorted(name for name in expected if name.endswith(tuple(PARAMETERS)))
    assert sorted(read) == sorted((key, 2 * prod(Shards(base).shape(key))) for key in changed)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    assert report["values"] == read_adapter(adapter).nnz and report["matrices_measured"] == report["matrices"]


def test_experts_that_are_trained_whole_are_merged_once_too(tmp_path, work):
    made, read = work
    base = base_of(tmp_path, "mixtral")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["experts"])
    saved = read_adapter(adapter)
    for name in saved.others:
        saved.others[name] += 1
    write_adapter(adapter, saved)
    merge(adapter, tmp_path / "merged", base)
    assert sorted(made) == sorted(saved.others)
    assert len(read) == len(dict(read))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in saved.others.items():
        assert torch.equal(merged[name], tensor.to(torch.bfloat16))


def test_the_published_form_of_gpt_oss_is_refused_as_quantized(tmp_path):
    base = base_of(tmp_path, "gpt_oss")
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=PARAMETERS)
    path = next(base.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, dtype=torch.uint8)}, path)
    index = base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    weight_map["weight_map"]["model.layers.0.mlp.experts.down_proj_blocks"] = path.name
    index.write_text(json.dumps(weight_map))
    with pytest.raises(SpftFileError, match=r"was saved quantized .*down_proj_blocks"):
        merge(adapter, tmp_path / "merged", base)


def test_experts_trained_whole_keep_the_dtypes_of_a_mixed_checkpoint(tmp_path):
    base = save_base(tmp_path / "base", lambda dtype: EXPERT_MODELS["qwen3_moe"]("eager", dtype), torch.bfloat16)
    file = next(
        path for path in sorted(base.glob("*.safetensors")) if any(".experts." in key for key in load_file(path))
    )
    tensors = load_file(file)
    widened = next(key for key in tensors if ".experts." in key)
    tensors[widened] = tensors[widened].float()
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["experts"])
    merge(adapter, tmp_path / "merged", base)
    merged = load_file(tmp_path / "merged" / file.name)
    experts = [key for key in tensors if ".experts." in key]
    # their values are as they were
    assert [key for key in experts if merged[key].dtype != tensors[key].dtype] == []
    assert [key for key in experts if not torch.equal(merged[key], tensors[key])] == []
