"""What a configuration trains that its loss would not reach, before the model loads."""

from __future__ import annotations

import json

import pytest

from axolotl_spft.plugin.args import check_run

GOOD = {"adapter": "spft", "optimizer": "sparse_adamw", "output_dir": "out"}
LIGER = {"liger_fused_linear_cross_entropy": True}
CCE = {"plugins": ["axolotl_spft.SpftPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]}


def problems(folder, config, loss, targets, **changes):
    (folder / "config.json").write_text(json.dumps(config))
    return check_run({**GOOD, "base_model": str(folder), **loss, "spft": {"target_modules": targets}, **changes})


TIED, UNTIED = {"model_type": "llama", "tie_word_embeddings": True}, {"model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "loss", "targets", "named"),
    [
        (UNTIED, LIGER, ["q_proj", "lm_head"], "lm_head"),
        (UNTIED, CCE, r".*(q_proj|lm_head)", r".*(q_proj|lm_head)"),
        (TIED, LIGER, ["embed_tokens"], "embed_tokens"),
        (TIED, CCE, ["model.embed_tokens", "q_proj"], "model.embed_tokens"),
        # whose file does not say what all of its kind have
        ({"model_type": "gemma"}, LIGER, ["embed_tokens"], "embed_tokens"),
        ({"model_type": "nobody_knows", "tie_word_embeddings": True}, LIGER, ["embed_tokens"], "embed_tokens"),
        (TIED, {"rl": "dpo", "dpo_use_liger_kernel": True}, ["embed_tokens"], "embed_tokens"),
        (UNTIED, {"rl": "grpo", "trl": {"use_liger_loss": True}}, ["lm_head"], "lm_head"),
    ],
)
def test_a_fused_loss_and_a_targeted_head_are_refused(tmp_path, config, loss, targets, named):
    (problem,) = problems(tmp_path, config, loss, targets)
    assert "multiplies by the head's weight without calling the head" in problem
    assert (
        f"`target_modules: {named}` would miss the head's part of their gradient: leave one of the two out" in problem
    )
    assert problem.startswith(("`liger_fused", "`plugins: CutCrossEntropyPlugin`", "`dpo_use_liger", "`trl.use_liger"))


@pytest.mark.parametrize(
    ("config", "loss", "targets"),
    [
        (UNTIED, LIGER, ["q_proj", "my_lm_head"]),
        (TIED, LIGER, "all-linear"),
        (UNTIED, LIGER, ["embed_tokens"]),
        ({}, CCE, ["embed_tokens", "q_proj"]),
        (TIED, {}, ["embed_tokens"]),
        (TIED, {**CCE, "cut_cross_entropy": False}, ["embed_tokens"]),
        (TIED, {"chunked_cross_entropy": True}, ["lm_head"]),
        (TIED, {"liger_cross_entropy": True, "liger_rope": True}, ["lm_head"]),
        # which give the model no labels
        (UNTIED, {**LIGER, "rl": "dpo"}, ["lm_head"]),
        # which has no loss
        (UNTIED, {**LIGER, "merge_lora": True, "lora_model_dir": "out"}, ["lm_head"]),
    ],
)
def test_other_losses_and_targets_pass(tmp_path, config, loss, targets):
    assert problems(tmp_path, config, loss, targets) == []


@pytest.mark.parametrize("key", ["overrides_of_model_config", "model_config"])
def test_the_override_of_a_tie_counts(tmp_path, key):
    untied = {key: {"tie_word_embeddings": False}}
    assert problems(tmp_path, TIED, LIGER, ["embed_tokens"], **untied) == []


@pytest.mark.parametrize(
    ("config", "targets", "left_out", "refused"),
    [
        (UNTIED, r".*(_proj|lm_head)", {"exclude_modules": ["lm_head"]}, False),
        (UNTIED, r".*(_proj|lm_head|embed_out)", {"exclude_modules": r"lm_\w+"}, False),
        (UNTIED, r".*(_proj|lm_head)", {"modules_to_save": ["lm_head"]}, False),
        (TIED, ["embed_tokens", "q_proj"], {"exclude_modules": ["model.embed_tokens"]}, False),
        (TIED, r".*(_proj|embed_tokens)", {"exclude_modules": [], "modules_to_save": None}, True),
        (UNTIED, ["lm_head"], {"exclude_modules": ["head", "my_lm_head", "embed_tokens"]}, True),
        (UNTIED, ["lm_head"], {"exclude_modules": "head"}, True),
        # a delta of the embedding is one of the head that is tied to it
        (TIED, ["embed_tokens"], {"exclude_modules": ["lm_head"]}, True),
        (TIED, ["lm_head"], {"exclude_modules": ["embed_tokens"]}, True),
    ],
)
def test_a_head_that_is_left_out_is_not_targeted(tmp_path, config, targets, left_out, refused):
    found = problems(tmp_path, config, LIGER, targets, spft={"target_modules": targets, **left_out})
    assert len(found) == refused


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": "big"},
        {"model_type": "llama", "num_hidden_layers": 2, "layer_types": ["x"]},
        {"model_type": "llama", "rope_parameters": 3},
        {"model_type": ["llama"]},
    ],
)
def test_a_broken_config_of_the_model_is_left_to_its_loader(tmp_path, config):
    assert problems(tmp_path, config, LIGER, ["embed_tokens"]) == []
    tied = {**config, "tie_word_embeddings": True}
    assert len(problems(tmp_path, tied, LIGER, ["embed_tokens"])) == 1
