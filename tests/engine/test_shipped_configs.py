"""Every configuration that users copy, through Axolotl's, DeepSpeed's and accelerate's own validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from axolotl_spft.plugin.deepspeed_json import problems_of_deepspeed, zero_stage

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/**/*.yml"))
DEEPSPEED = sorted(ROOT.glob("integration/deepspeed/*.json"))
ACCELERATE = sorted(ROOT.glob("integration/accelerate/*.yml"))


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_there_are_configurations_for_every_stage():
    assert names(DEEPSPEED) == [
        f"integration/deepspeed/zero{stage}{ending}.json" for stage in (1, 2, 3) for ending in ("", "_offload")
    ]
    assert {"examples/llama-8b/zero2.yml", "examples/llama-8b/zero3.yml", "examples/llama-70b/zero3.yml"} <= {
        *names(EXAMPLES)
    }
    assert names(ACCELERATE) == ["integration/accelerate/one_node.yml", "integration/accelerate/two_nodes.yml"]


@pytest.mark.parametrize("path", EXAMPLES, ids=names(EXAMPLES))
def test_axolotl_accepts_the_examples(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = DictDefault(yaml.safe_load(path.read_text()))
    prepare_plugins(cfg)
    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "n_node": 1, "compute_capability": "sm_90"}
    checked = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    assert checked.adapter == "spft"
    assert checked.spft["density"] == cfg.spft["density"]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "quickstart" not in path.parts], ids=lambda p: p.stem)
def test_the_examples_say_how_they_are_launched_what_they_need_and_why_that_rate(path):
    head = path.read_text().partition("base_model:")[0]
    assert "accelerate launch" in head and f"examples/{path.parent.name}/{path.name}" in head
    assert "# Memory per GPU of" in head and "axolotl spft plan" in head and "# Learning rate:" in head


@pytest.mark.parametrize("path", DEEPSPEED, ids=names(DEEPSPEED))
def test_deepspeed_accepts_its_configurations(path, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = json.loads(path.read_text())
    cfg = {"deepspeed": str(path), "bf16": True, "optimizer": "sparse_adamw", "gradient_checkpointing": True}
    assert problems_of_deepspeed(cfg, own_optimizer=True) == []
    try:
        resolved = HfTrainerDeepSpeedConfig(settings)
        arguments = TrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[])
        resolved.trainer_config_process(arguments)
    finally:
        unset_hf_deepspeed_config()
    config = DeepSpeedConfig(resolved.config)
    assert config.zero_config.stage == zero_stage(settings)
    assert config.bfloat16_config.enabled
    assert config.grad_accum_dtype == "fp32"
    # 25 million values in float32: what the largest bucket allocates outright stays below 100 MiB
    assert config.zero_config.reduce_bucket_size * 4 < 100 * 2**20
    assert (config.zero_config.offload_optimizer is not None) == ("offload" in path.name)


@pytest.mark.parametrize("path", ACCELERATE, ids=names(ACCELERATE))
def test_accelerate_accepts_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    assert str(config.distributed_type).endswith("MULTI_GPU")
