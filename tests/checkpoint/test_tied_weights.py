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
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.serving import apply_adapter
from tests.checkpoint.saved import merged_in_memory, save_adapter, save_base, tied_llama
from tests.models import logits, same_weights, tiny_llama, weights_of, with_adapter

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


def stored_as(folder, layout: str, dtype=torch.bfloat16):
    """The tied base, whose file has the weight under one name, under the other, or under both."""
    save_base(folder, tied_llama, dtype, max_shard_size="5GB")
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
    merge(adapter, tmp_path / "merged", stored_as(tmp_path / "base", layout))
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


def save_trained_whole(folder, model, modules: list[str]):
    """An adapter whose `modules_to_save` have moved, as a training leaves them."""
    model = with_adapter(model, modules_to_save=modules, target_modules=["q_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("layout", ["embedding", "head", "both"])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_what_was_trained_whole_parts_from_what_the_base_ties_it_to(tmp_path, modules, layout):
    base = stored_as(tmp_path / "base", layout, torch.float32)
    trained = save_trained_whole(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), modules)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged, expected = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        merged_in_memory(base, tmp_path / "adapter"),
    )
    assert merged.keys() == expected.keys() and [k for k in merged if not torch.equal(merged[k], expected[k])] == []
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["architectures"] == ["LlamaForCausalLM"]
    # the delta is added in the layer or to the weight
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), logits(trained), atol=1e-4)


def test_what_was_trained_whole_and_is_equal_stays_tied(tmp_path):
    base = stored_as(tmp_path / "base", "embedding", torch.float32)
    with_adapter(
        AutoModelForCausalLM.from_pretrained(base), modules_to_save=["embed_tokens", "lm_head"]
    ).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert HEAD not in load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_added_tokens_are_merged_under_the_names_of_the_model(tmp_path, modules):
    base = stored_as(tmp_path / "base", "embedding", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    trained = save_trained_whole(tmp_path / "adapter", model, modules)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(base / "model.safetensors").keys() | {HEAD}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == 70 and "id2label" not in config and config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), logits(trained), atol=1e-4)


@pytest.mark.parametrize("make", [tied_llama, tiny_llama])
def test_added_tokens_of_an_embedding_with_a_delta_are_merged_too(tmp_path, make):
    base = save_base(tmp_path / "base", make, torch.float32, "5GB")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    trained = with_adapter(model, target_modules=["embed_tokens", "q_proj"])
    trained.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.vocab_size == 70 and loaded.config.tie_word_embeddings == (make is tied_llama)
    assert torch.allclose(logits(loaded), logits(trained), atol=1e-4)


def test_a_grown_half_of_a_tied_pair_whose_other_half_is_nowhere_is_one_clear_error(tmp_path):
    base = stored_as(tmp_path / "base", "embedding")
    save_trained_whole(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), ["embed_tokens"])
    saved = read_adapter(tmp_path / "adapter")
    saved.others[EMBEDDING] = torch.cat([saved.others[EMBEDDING], torch.zeros(3, 36)])
    write_adapter(tmp_path / "grown", saved)
    with pytest.raises(SpftFileError, match=r"embed_tokens\.weight has \(70, 36\).*lm_head.*`modules_to_save`"):
        merge(tmp_path / "grown", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_what_was_trained_whole_is_not_served_where_it_is_one_weight_with_another(tmp_path):
    base = stored_as(tmp_path / "base", "embedding", torch.float32)
    for modules in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        folder = tmp_path / "-".join(modules)
        trained = save_trained_whole(folder, AutoModelForCausalLM.from_pretrained(base), modules)
        served = AutoModelForCausalLM.from_pretrained(base)
        before = weights_of(served)
        with pytest.raises(SpftError, match=r"trained whole.*is one weight with .* here: serve the merged model"):
            apply_adapter(served, folder)
        assert same_weights(served, before)
        apart = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
        apart.lm_head.weight.data.copy_(apart.model.embed_tokens.weight)
        apply_adapter(apart, folder)
        assert torch.allclose(logits(apart), logits(trained), atol=1e-4)
