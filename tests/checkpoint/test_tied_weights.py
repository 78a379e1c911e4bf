"""Merges and sums of adapters whose base ties weights, or does not: to what was one weight in training, no other."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.errors import SpftFileError
from tests.checkpoint.saved import merged_in_memory, save_adapter, save_base, tied_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One model, saved so that the embedding and the head are one weight, or two equal ones."""
    folder = tmp_path_factory.mktemp("bases")
    save_base(folder / "tied", tied_llama, max_shard_size="5GB")
    untied = AutoModelForCausalLM.from_pretrained(folder / "tied", tie_word_embeddings=False)
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    untied.save_pretrained(folder / "untied")
    return folder


def stored_as(bases, folder, layout: str):
    """The tied base, whose file has the weight under one name, under the other, or under both."""
    save_base(folder, tied_llama, max_shard_size="5GB")
    tensors = load_file(folder / "model.safetensors")
    if layout != "embedding":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if layout == "head":
        del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["embedding", "head", "both"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_deltas_of_two_weights_part_them_in_a_base_that_ties_them(bases, tmp_path, targets, layout):
    adapter = save_adapter(tmp_path / "adapter", bases / "untied", target_modules=targets)
    merge(adapter, tmp_path / "merged", stored_as(bases, tmp_path / "base", layout))
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), merged_in_memory(bases / "untied", adapter)
    assert merged.keys() == expected.keys() and [k for k in merged if not torch.equal(merged[k], expected[k])] == []
    assert not torch.equal(merged[EMBEDDING], merged[HEAD])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_one_delta_of_two_modules_is_not_merged_where_they_are_two_weights(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases / "tied", target_modules=["lm_head", "q_proj"])
    with pytest.raises(
        SpftFileError,
        match=r"lm_head and model\.embed_tokens were one weight where .* and are different weights in .*untied: load",
    ):
        merge(adapter, tmp_path / "merged", bases / "untied")
    assert not list(tmp_path.glob("merged/*.safetensors"))
    other = save_adapter(tmp_path / "other", bases / "tied", target_modules=["q_proj"])
    merge(other, tmp_path / "merged", bases / "untied")


def test_sums_know_what_was_one_weight(bases, tmp_path):
    folders = [
        save_adapter(tmp_path / str(seed), bases / base, seed, target_modules=targets)
        for seed, (base, targets) in enumerate(
            [("tied", ["embed_tokens"]), ("tied", ["q_proj"]), ("untied", ["q_proj"]), ("untied", ["embed_tokens"])]
        )
    ]
    tied, plain, of_untied, apart = map(read_adapter, folders)
    for others in ([plain], [of_untied], [plain, of_untied]):
        write_adapter(tmp_path / "sum", combine([tied, *others])[0])
        with pytest.raises(SpftFileError, match=r"were one weight"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "untied"), tmp_path / "sum")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "tied"), tmp_path / "sum")
    with pytest.raises(SpftFileError, match=r"embed_tokens is one weight with lm_head for one .*adapters of one base"):
        combine([tied, apart])
