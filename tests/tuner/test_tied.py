"""An adapter is loaded where the same modules are one weight as where it was trained, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_spft import SpftConfig
from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.errors import SpftFileError
from axolotl_spft.serving import apply_adapter
from axolotl_spft.tuner.record import FILE_KEY, record_of, record_to_tensor
from tests.models import logits, same_weights, tiny_qwen2, weights_of, with_adapter

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def made(tied: bool, targets=("embed_tokens", "q_proj")):
    return with_adapter(tiny_qwen2(tie_word_embeddings=tied), target_modules=list(targets))


def saved(folder, tied: bool, targets=("embed_tokens", "q_proj")):
    made(tied, targets).save_pretrained(folder)
    return folder


def changed_record(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[FILE_KEY] = record_to_tensor(change(record_of(tensors)))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def test_a_file_records_what_was_one_weight(tmp_path):
    recorded = {
        name: record_of(load_file(saved(tmp_path / name, *given) / WEIGHTS_FILE))["tied"]
        for name, given in {
            "tied": (True,),
            "by the head": (True, ["lm_head"]),
            "untied": (False, ["embed_tokens", "lm_head"]),
            "others": (True, ["q_proj"]),
        }.items()
    }
    assert recorded == {"tied": {EMBEDDING: [HEAD]}, "by the head": {EMBEDDING: [HEAD]}, "untied": {}, "others": {}}


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]], ids=["embedding", "head"])
def test_one_delta_of_two_modules_is_not_loaded_where_they_are_two_weights(tmp_path, targets):
    folder = saved(tmp_path, True, targets)
    message = (
        r"lm_head and model\.embed_tokens were one weight where the adapter was trained, with one delta, and are "
        r"different weights in this model: load the base model that it was trained on, with `tie_word_embeddings: true`"
    )
    base = tiny_qwen2()
    before = weights_of(base)
    with pytest.raises(SpftFileError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert same_weights(base, before)
    model = made(False, ["embed_tokens", "lm_head"])
    expected = logits(model)
    with pytest.raises(SpftFileError, match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)
    with pytest.raises(SpftFileError, match=message):
        model.load_adapter(folder, "default")
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_qwen2(tie_word_embeddings=True), folder)), logits(made(True, targets))
    )


def test_the_delta_of_an_embedding_is_not_loaded_where_the_head_would_get_it_too(tmp_path):
    folder = saved(tmp_path, False)
    base = tiny_qwen2(tie_word_embeddings=True)
    message = (
        r"it was trained where model\.embed_tokens was a weight of its own, and this model ties it to lm_head: load "
        r"the model with `tie_word_embeddings: false`, or merge the adapter with `axolotl spft merge`, which unties it"
    )
    with pytest.raises(SpftFileError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_qwen2(), folder)), logits(made(False)))


def test_an_older_file_does_not_say_what_was_one_weight(tmp_path):
    folder = saved(tmp_path, True)
    changed_record(folder, lambda record: {key: value for key, value in record.items() if key != "tied"})
    loaded = PeftModel.from_pretrained(tiny_qwen2(tie_word_embeddings=True), folder)
    assert torch.equal(logits(loaded), logits(made(True)))


def test_names_of_then_are_compared_by_those_of_now(tmp_path):
    folder = saved(tmp_path, True)
    changed_record(folder, lambda record: record | {"tied": {"old.embed_tokens": ["head_of_old"]}})
    base = tiny_qwen2(tie_word_embeddings=True)
    base._checkpoint_conversion_mapping = {r"^old\.": "model.", "^head_of_old": "lm_head"}
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), logits(made(True)))


def test_an_adapter_is_switched_on_only_where_the_same_modules_are_one_weight(tmp_path):
    tied, untied = saved(tmp_path / "tied", True), saved(tmp_path / "untied", False)
    model = tiny_qwen2(tie_word_embeddings=True)
    before = weights_of(model)
    applied = apply_adapter(model, tied)
    assert (logits(model) - logits(made(True))).abs().max() <= 1e-5 * logits(model).abs().max()
    applied.revert()
    with pytest.raises(Exception, match=r"model\.embed_tokens was a weight of its own .* is one with lm_head here"):
        apply_adapter(model, untied)
    assert same_weights(model, before)
    with pytest.raises(Exception, match=r"lm_head and model\.embed_tokens were one weight .* in this model"):
        apply_adapter(tiny_qwen2(), tied)
    apply_adapter(tiny_qwen2(), untied)


def test_an_adapter_of_a_model_that_ties_goes_on_in_a_second_one(tmp_path):
    model = made(True)
    model.add_adapter("second", SpftConfig(init_weights=False, density=0.1, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(SpftFileError, match="were one weight"):
        PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "second")
