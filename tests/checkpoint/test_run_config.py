"""The config of a merged model is that of the model that was trained."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from axolotl_spft.checkpoint.companions import CONFIG
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.report import describe_merge
from axolotl_spft.checkpoint.run_config import config_of_run, with_changes
from axolotl_spft.checkpoint.skeleton import skeleton
from tests.checkpoint.saved import save_adapter, save_base
from tests.families import FAMILIES
from tests.models import VOCABULARY, logits, tiny_llama, tiny_qwen2

LONGER = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}


def _save(tmp_path, make=tiny_llama, **changes):
    """A base and an adapter of a run that changed its config, which lies beside it as Axolotl leaves it there."""
    base = save_base(tmp_path / "base", make)
    run = save_adapter(tmp_path / "run", base)
    config = AutoConfig.from_pretrained(base)
    for key, value in changes.items():
        setattr(config, key, value)
    config.use_cache, config.dtype = False, "float32"
    config.save_pretrained(run)
    return base, run


def _config(folder) -> dict:
    return json.loads((folder / CONFIG).read_text())


def _merged_and_trained(tmp_path):
    config = AutoConfig.from_pretrained(tmp_path / "run")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config, dtype=torch.float32)
    trained = PeftModel.from_pretrained(trained, tmp_path / "run").merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), trained


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_run_changed_is_in_the_merged_config_and_all_else_is_the_bases(tmp_path):
    changes = {"rope_parameters": LONGER, "max_position_embeddings": 512, "eos_token_id": 5, "bos_token_id": 3}
    base, run = _save(tmp_path, **changes)
    before = _config(base)
    report = merge(run, tmp_path / "merged", base)
    assert _config(tmp_path / "merged") == before | changes
    assert report["config_of_run"] == {"changed": sorted(changes), "of_another_model": None}
    assert "As in the run: bos_token_id, eos_token_id, max_position_embeddings, rope" in describe_merge(report)
    merged, trained = _merged_and_trained(tmp_path)
    torch.testing.assert_close(logits(merged), logits(trained), atol=2e-2, rtol=2e-2)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, config=LlamaConfig(**before))
    assert (logits(other) - logits(trained)).abs().max() > 0.1


@pytest.mark.parametrize("without", ["changes", "file"])
def test_a_run_that_changed_nothing_or_left_no_config_has_the_bases(tmp_path, without):
    base, run = _save(tmp_path)
    if without == "file":
        (run / CONFIG).unlink()
    # as older releases wrote it
    _edit(base / CONFIG, rope_theta=10000.0, torch_dtype="bfloat16", rope_scaling=None)
    report = merge(run, tmp_path / "merged", base)
    assert _config(tmp_path / "merged") == _config(base)
    assert report["config_of_run"] == {"changed": [], "of_another_model": None}


@pytest.mark.parametrize("other", [tiny_qwen2, lambda: tiny_llama(hidden_size=28), None])
def test_a_config_of_another_model_is_not_taken_and_told(tmp_path, other):
    base, run = _save(tmp_path)
    if other:
        other().config.save_pretrained(run)
    else:
        (run / CONFIG).write_text("{")
    report = merge(run, tmp_path / "merged", base)
    assert _config(tmp_path / "merged") == _config(base)
    assert f"{run / CONFIG} is of another model than this, and was not read" in describe_merge(report)


def test_layers_that_a_run_left_out_stay_out(tmp_path):
    base, run = _save(tmp_path, num_hidden_layers=1)
    kept = (run / CONFIG).read_text()
    save_adapter(run, base, layers_to_transform=[0])
    (run / CONFIG).write_text(kept)
    merge(run, tmp_path / "merged", base)
    merged, trained = _merged_and_trained(tmp_path)
    assert merged.config.num_hidden_layers == 1
    torch.testing.assert_close(logits(merged), logits(trained), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_tie_that_a_run_changed_is_merged_as_it_was_trained(tmp_path, targets):
    base, _ = _save(tmp_path)
    run = save_adapter(tmp_path / "run", base, target_modules=targets)
    # the files have both; only the run has them apart
    _edit(base / CONFIG, tie_word_embeddings=True)
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = False
    config.save_pretrained(run)
    merge(run, tmp_path / "merged", base)
    merged, trained = _merged_and_trained(tmp_path)
    torch.testing.assert_close(merged.lm_head.weight, trained.lm_head.weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(logits(merged), logits(trained), atol=2e-2, rtol=2e-2)


def test_a_checkpoint_of_a_run_has_the_config_of_the_run(tmp_path):
    base, run = _save(tmp_path, eos_token_id=5)
    checkpoint = save_adapter(run / "checkpoint-3", base)
    merge(checkpoint, tmp_path / "merged", base)
    assert _config(tmp_path / "merged")["eos_token_id"] == 5
    (run / "best").mkdir()
    merge(checkpoint.rename(run / "best/adapter"), tmp_path / "merged", base)
    assert _config(tmp_path / "merged") == _config(base)


def test_keys_of_older_releases_tell_the_same(tmp_path):
    base, run = _save(tmp_path, rope_parameters=LONGER)
    old = {"rope_theta": 10000.0, "rope_scaling": None}
    changes = {("rope_parameters",): LONGER}
    assert with_changes(old, changes) == {
        "rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": LONGER
    }  # fmt: skip
    default = {"rope_type": "default", "rope_theta": 50.0}
    assert with_changes(old, {("rope_parameters",): default})["rope_scaling"] is None
    config = _config(base)
    del config["rope_parameters"]
    (base / CONFIG).write_text(json.dumps(config | old))
    merge(run, tmp_path / "merged", base)
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == LONGER
    # kinds of layers each with its own have no such keys
    assert with_changes(old, {("rope_parameters",): {"full": default}}) == {"rope_parameters": {"full": default}}


def test_parts_of_a_config_are_changed_where_they_are(tmp_path):
    config = next(family for family in FAMILIES if family.images).make().config
    config.save_pretrained(tmp_path / "base")
    model = skeleton(tmp_path / "base")
    config.text_config.max_position_embeddings, config.text_config.use_cache = 999, False
    config.save_pretrained(tmp_path / "run")
    found = config_of_run(tmp_path / "run", tmp_path / "base", model)
    assert found.changes == {("text_config", "max_position_embeddings"): 999}
    before = _config(tmp_path / "base")
    after = with_changes(before, found.changes)
    assert after["text_config"] == before["text_config"] | {"max_position_embeddings": 999}
    assert {key: value for key, value in after.items() if key != "text_config"}.items() <= before.items()


@pytest.mark.parametrize(("had", "has"), [(2, [5, 2]), ([2, 5], [2, 5]), ([2, 7], [5, 2, 7]), (None, [5])])
def test_generation_ends_where_the_run_ends_too(tmp_path, had, has):
    base, run = _save(tmp_path, eos_token_id=5)
    GenerationConfig(eos_token_id=had, bos_token_id=1, top_p=0.5, do_sample=True).save_pretrained(base)
    merge(run, tmp_path / "merged", base)
    found = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (found.eos_token_id, found.bos_token_id, found.top_p) == (has, 1, 0.5)


def test_the_padding_of_the_runs_tokenizer_counts(tmp_path):
    """Trainers give it to the model after Axolotl has written the config; it may be new."""
    base, run = _save(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "<pad>": VOCABULARY, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(run)
    GenerationConfig(eos_token_id=2, pad_token_id=1).save_pretrained(base)
    report = merge(run, tmp_path / "merged", base)
    assert _config(tmp_path / "merged") == _config(base) | {"pad_token_id": VOCABULARY}
    assert report["config_of_run"]["changed"] == ["pad_token_id"]
    assert GenerationConfig.from_pretrained(tmp_path / "merged").pad_token_id == VOCABULARY
