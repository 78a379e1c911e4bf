"""Base checkpoints read under the names of the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.shards import INDEX_FILE, Shards
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
