"""axolotl's other commands on a trained sparse adapter."""

from __future__ import annotations

import csv

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import axolotl_spft.tuner  # noqa: F401  registers the PEFT method
from integration.engines.workspace import write_config
from tests.e2e.commands import run_axolotl

pytestmark = pytest.mark.e2e


def logits(model, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def test_merge_lora_writes_a_plain_model_with_the_same_logits(workspace, trained):
    output_dir, _ = trained
    run_axolotl("merge-lora", workspace / "trained.yml")
    base = AutoModelForCausalLM.from_pretrained(workspace / "base")
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, output_dir))
    merged = logits(AutoModelForCausalLM.from_pretrained(output_dir / "merged"))
    assert torch.equal(merged, adapted)
    assert not torch.equal(before, adapted)


def test_evaluate_with_and_without_the_adapter(workspace, trained):
    output_dir, _ = trained

    def held_out_loss(name: str, **changes) -> float:
        config = write_config(workspace, name, **changes)
        run_axolotl("evaluate", config, "--launcher", "python")
        with (workspace / name / "eval_summary.csv").open() as file:
            return float({row["metric"]: row["validation"] for row in csv.DictReader(file)}["loss"])

    assert held_out_loss("judged", lora_model_dir=str(output_dir)) < held_out_loss("untrained") - 0.05


def test_inference_answers_from_the_adapter(workspace, trained):
    output_dir, _ = trained
    config = write_config(workspace, "served", lora_model_dir=str(output_dir))
    done = run_axolotl("inference", config, "--launcher", "python", stdin="Add 1 and 2.\n\x04")
    assert "Add 1 and 2." in done.stdout


def test_inference_without_an_adapter_is_refused(workspace):
    config = write_config(workspace, "unserved")
    done = run_axolotl("inference", config, "--launcher", "python", check=False, stdin="\x04")
    assert done.returncode != 0
    assert "`lora_model_dir` is not set" in done.stdout


def test_preprocess(workspace):
    config = write_config(workspace, "preprocessed", dataset_prepared_path=str(workspace / "prepared_first"))
    run_axolotl("preprocess", config)
    assert any((workspace / "prepared_first").rglob("*.arrow"))
