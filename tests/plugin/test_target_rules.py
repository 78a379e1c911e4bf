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
