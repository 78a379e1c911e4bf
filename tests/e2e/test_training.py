"""Training through the real axolotl command line: mask, optimizer, checkpoints, resume."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from axolotl_spft.tuner.record import FILE_KEY, record_from_tensor
from integration.engines.figures import losses
from integration.engines.run import train_all
from integration.engines.workspace import write_config
from tests.e2e.commands import run_axolotl

pytestmark = pytest.mark.e2e

REWARDS = """
def to_prompt(cfg, **_):
    return (lambda example: {"prompt": example["instruction"]}), {"remove_columns": ["instruction", "input", "output"]}


def distinct_letters(prompts, completions, **_):
    return [float(len(set(completion))) for completion in completions]
"""


def same_bits(one, two) -> bool:
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype
        and torch.equal(one[key].reshape(-1).view(torch.uint8), two[key].reshape(-1).view(torch.uint8))
        for key in one
    )


def assert_same_checkpoint(one, two) -> None:
    adapters = [load_file(path / "adapter_model.safetensors") for path in (one, two)]
    # the options that the record names are those of each run; where the mask came from is not
    sources = [record_from_tensor(adapter.pop(FILE_KEY))["mask_source"] for adapter in adapters]
    assert sources[0] == sources[1]
    assert same_bits(*adapters)
    first, second = (torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two))
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    assert all(same_bits(first["state"][number], second["state"][number]) for number in first["state"])


def test_training_lowers_the_loss_and_prints_one_table(trained):
    output_dir, log = trained
    history = losses(output_dir, 6)
    assert len(history) == 6
    assert history[-1] < history[0] - 0.1
    assert log.count("Sparse mask: salience gradient, scope layer, samples 8, seed 7") == 1
    assert "down_proj" in log
    assert "total" in log
    assert f"axolotl merge-lora {output_dir.parent}/trained.yml --lora-model-dir={output_dir}" in log


def test_optimizer_state_exists_for_the_values_only(trained):
    output_dir, _ = trained
    nnz = json.loads((output_dir / "adapter_config.json").read_text())["nnz"]
    state = torch.load(output_dir / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sum(entry[moment].numel() for entry in state.values()) == nnz
        assert all(entry[moment].dtype == torch.float32 for entry in state.values())


def test_every_trained_value_moved(trained):
    output_dir, _ = trained
    tensors = load_file(output_dir / "adapter_model.safetensors")
    values = torch.cat([tensor for key, tensor in tensors.items() if key.endswith("spft_values")])
    assert (values != 0).float().mean() > 0.99


@pytest.fixture(scope="module")
def runs(workspace, trained, mask_alone):
    """Further trainings in one process: name -> (output folder, error or None, log)."""
    output_dir, _ = trained
    shutil.copytree(output_dir / "checkpoint-3", workspace / "auto" / "checkpoint-3")
    (workspace / "half" / "checkpoint-3").mkdir(parents=True)
    (workspace / "torn" / "checkpoint-3").mkdir(parents=True)
    pairs = [
        # the question for DPO, the input for reward models
        {"system": "", "question": question, "input": question, "chosen": f"It is {a + 2}.", "rejected": "No."}
        for a, question in ((a, f"Add {a} and 2.") for a in range(24))
    ]
    (workspace / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pairs_set = [{"path": str(workspace / "pairs.jsonl"), "ds_type": "json", "type": "chatml.intel", "split": "train"}]
    (workspace / "rewards.py").write_text(REWARDS)
    grpo = {
        "rl": "grpo",
        "datasets": [pairs_set[0] | {"path": str(workspace / "train.jsonl"), "type": "rewards.to_prompt"}],
        "trl": {
            "reward_funcs": ["rewards.distinct_letters"],
            "beta": 0.1,
            "num_generations": 4,
            "max_completion_length": 8,
            "use_vllm": False,
        },
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "val_set_size": 0,
        "lora_model_dir": str(output_dir),
    }
    mask = str(mask_alone[0])
    configs = [
        write_config(
            workspace,
            "auto",
            auto_resume_from_checkpoints=True,
            spft={"density": 0.05, "samples": 8, "mask_path": str(workspace / "second_pass.safetensors")},
        ),
        write_config(workspace, "explicit", resume_from_checkpoint=str(output_dir / "checkpoint-3")),
        write_config(workspace, "half", auto_resume_from_checkpoints=True),
        write_config(workspace, "named_half", resume_from_checkpoint=str(workspace / "torn" / "checkpoint-3")),
        write_config(workspace, "from_mask", spft={"density": 0.05, "mask_path": mask}),
        write_config(workspace, "recomputed"),
        write_config(workspace, "continued", lora_model_dir=str(output_dir)),
        write_config(
            workspace,
            "four_bit",
            load_in_4bit=True,
            bf16=True,
            spft={"density": 0.05, "samples": 8, "repair": 0.3},
        ),
        write_config(workspace, "eight_bit", load_in_8bit=True, gradient_checkpointing=True),
        write_config(workspace, "packed", sample_packing=True, pad_to_sequence_len=True, attn_implementation="sdpa"),
        write_config(workspace, "bf16", bf16=True, gradient_checkpointing=True, optimizer="adamw_torch"),
        write_config(workspace, "dpo", rl="dpo", datasets=pairs_set, val_set_size=0),
        write_config(
            workspace, "dpo_continued", rl="dpo", datasets=pairs_set, val_set_size=0, lora_model_dir=str(output_dir)
        ),
        write_config(
            workspace,
            "new_tokens",
            tokens=["<|new|>"],
            special_tokens={"pad_token": "<pad>", "eos_token": "<|end|>"},
            spft={"density": 0.05, "samples": 8, "modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        write_config(
            workspace,
            "reward",
            reward_model=True,
            model_type="AutoModelForSequenceClassification",
            num_labels=1,
            chat_template="chatml",
            datasets=[pairs_set[0] | {"type": "bradley_terry.chat_template"}],
            remove_unused_columns=False,
            val_set_size=0,
        ),
        write_config(workspace, "grpo", **grpo),
        write_config(workspace, "grpo_resumed", resume_from_checkpoint=str(workspace / "grpo/checkpoint-3"), **grpo),
        write_config(workspace, "dense_only", adapter=None, spft=None, optimizer="adamw_torch", max_steps=1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(workspace), prepend=os.pathsep)
        return train_all(configs, ranks=1)


@pytest.mark.parametrize("name", ["auto", "explicit"])
def test_resumed_equals_uninterrupted_bit_for_bit(trained, runs, workspace, name):
    output_dir, _ = trained
    assert runs[name] is None
    assert_same_checkpoint(output_dir / "checkpoint-6", workspace / name / "checkpoint-6")
    assert losses(output_dir, 6) == losses(workspace / name, 6)


def test_resume_takes_the_mask_from_the_checkpoint(runs, workspace):
    assert runs["auto"] is None
    # a second salience pass would have saved its mask
    assert (workspace / "mask.safetensors").is_file()
    assert not (workspace / "second_pass.safetensors").exists()


def test_an_incomplete_checkpoint_is_set_aside(runs, workspace):
    assert runs["half"] is None
    assert (workspace / "half" / "incomplete-checkpoint-3").is_dir()
    assert (workspace / "half" / "checkpoint-6").is_dir()


def test_resume_from_an_incomplete_checkpoint_by_name_is_refused(runs):
    for part in ("is not a complete checkpoint", "adapter_model.safetensors is missing", "name a complete one"):
        assert part in runs["named_half"]


def test_the_mask_command_makes_the_mask_of_the_run_and_nothing_else(workspace, trained, mask_alone):
    path, log = mask_alone
    assert same_bits(load_file(path), load_file(workspace / "mask.safetensors"))
    assert log.count("Sparse mask: salience gradient, scope layer, samples 8, seed 7") == 1
    assert f"axolotl spft inspect {path}" in log
    assert not (workspace / "never_made").exists()


@pytest.mark.parametrize("name", ["from_mask", "recomputed"])
def test_salience_pass_leaves_no_trace(trained, runs, workspace, name):
    """With the mask of `axolotl spft mask`, or computed again, the run is the same bit for bit."""
    output_dir, _ = trained
    assert runs[name] is None
    assert_same_checkpoint(output_dir / "checkpoint-6", workspace / name / "checkpoint-6")
    assert losses(output_dir, 6) == losses(workspace / name, 6)


def test_lora_model_dir_continues_with_its_mask(trained, runs, workspace):
    output_dir, _ = trained
    assert runs["continued"] is None
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (output_dir, workspace / "continued")
    )
    masks = [key for key in before if not key.endswith("spft_values")]
    assert same_bits({key: before[key] for key in masks}, {key: after[key] for key in masks})
    assert losses(workspace / "continued", 6)[0] < losses(output_dir, 6)[0] - 0.1


@pytest.mark.parametrize("name", ["four_bit", "eight_bit", "packed", "bf16", "dpo", "new_tokens"])
def test_other_runs_train(runs, workspace, name):
    assert runs[name] is None
    history = losses(workspace / name, 6)
    assert history[-1] < history[0] - 0.05
    tensors = load_file(workspace / name / "adapter_model.safetensors")
    values = torch.cat([tensor for key, tensor in tensors.items() if key.endswith("spft_values")])
    assert torch.isfinite(values).all()
    assert values.abs().max() > 0


def test_preference_training_from_an_adapter_is_refused(runs):
    assert "is not read under `rl: dpo`" in runs["dpo_continued"]


def test_reinforcement_learning_from_an_adapter_compares_with_that_adapter(runs, workspace):
    assert runs["grpo"] is None
    state = json.loads((workspace / "grpo/checkpoint-6/trainer_state.json").read_text())
    divergence = [entry["kl"] for entry in state["log_history"] if "kl" in entry]
    assert divergence[0] == 0
    assert divergence[-1] > 0


def test_reinforcement_learning_resumes_bit_for_bit(runs, workspace):
    assert runs["grpo_resumed"] is None
    whole, resumed = workspace / "grpo/checkpoint-6", workspace / "grpo_resumed/checkpoint-6"
    assert_same_checkpoint(whole, resumed)
    assert same_bits(*(load_file(path / "ref/adapter_model.safetensors") for path in (whole, resumed)))


def test_a_reward_model_is_trained_and_merged(runs, workspace):
    assert runs["reward"] is None
    run_axolotl("merge-lora", workspace / "reward.yml")
    base, merged = (load_file(workspace / name / "model.safetensors") for name in ("base", "reward/merged"))
    adapter = load_file(workspace / "reward/adapter_model.safetensors")
    assert torch.equal(merged["score.weight"], adapter["base_model.model.score.weight"])
    name = "model.layers.0.mlp.up_proj"
    nnz = adapter[f"base_model.model.{name}.spft_values"].numel()
    assert 0.9 * nnz < (merged[f"{name}.weight"] != base[f"{name}.weight"]).sum() <= nnz


def test_new_tokens_are_trained_saved_and_merged(runs, workspace):
    assert runs["new_tokens"] is None
    run_axolotl("merge-lora", workspace / "new_tokens.yml")
    adapter = load_file(workspace / "new_tokens" / "adapter_model.safetensors")
    base, merged = (load_file(workspace / name / "model.safetensors") for name in ("base", "new_tokens/merged"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(merged[name]) > len(base[name])
        assert torch.equal(merged[name], adapter[f"base_model.model.{name}"])
        assert not torch.equal(merged[name][: len(base[name])], base[name])
    assert not torch.equal(*(weights["model.layers.0.mlp.up_proj.weight"] for weights in (base, merged)))


def test_plugin_leaves_runs_without_it_alone(runs, workspace):
    assert runs["dense_only"] is None
    assert (workspace / "dense_only" / "model.safetensors").is_file()


def test_all_problems_of_a_config_come_at_once_before_the_model_loads(workspace):
    config = write_config(
        workspace,
        "bad",
        base_model=str(workspace / "no_such_model"),
        spft={"densty": 1, "density": 2, "num_values": 4, "reselct": {"every": 5}},
        lora_r=8,
    )
    done = run_axolotl("train", config, check=False)
    assert done.returncode != 0
    for part in (
        "unknown key `densty` (did you mean `density`?)",
        "`density: 2` must be a number in (0, 1]",
        "keep exactly one",
        "unknown key `reselct` (did you mean `reselect`?)",
        "`lora_r: 8` has no meaning",
    ):
        assert part in done.stdout
    assert "Loading weights" not in done.stdout
