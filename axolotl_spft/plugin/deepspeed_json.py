"""The rules of a DeepSpeed configuration beside `adapter: spft`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_spft.plugin.quantization import run_dtype


def read_deepspeed_json(deepspeed: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration that Axolotl's key ``deepspeed`` names or holds.

    Raises:
        ValueError: it cannot be read; the text says why and what to do.
    """
    if isinstance(deepspeed, Mapping):
        return deepspeed
    if not isinstance(deepspeed, str):
        raise ValueError(f"`deepspeed: {deepspeed}` must be the path of a JSON file or a block of its keys")
    try:
        settings = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"`deepspeed: {deepspeed}` cannot be read ({error.strerror}): name a DeepSpeed JSON file, for example a "
            "copy of one from `integration/deepspeed`"
        ) from error
    except ValueError as error:
        raise ValueError(f"`deepspeed: {deepspeed}` is not valid JSON ({error}): correct the file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`deepspeed: {deepspeed}` must hold a JSON object: correct the file")
    return settings


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 where it partitions nothing."""
    return int((settings.get("zero_optimization") or {}).get("stage", 0))


def problems_of_deepspeed(cfg: Mapping[str, Any], own_optimizer: bool) -> list[str]:
    """Every problem of a run's DeepSpeed configuration, one sentence each.

    Args:
        cfg: the Axolotl configuration; its key ``deepspeed`` is set.
        own_optimizer: whether the optimizer is `SparseAdamW`.
    """
    deepspeed = cfg["deepspeed"]
    try:
        settings = read_deepspeed_json(deepspeed)
    except ValueError as error:
        return [str(error)]
    name = "the DeepSpeed settings" if isinstance(deepspeed, Mapping) else str(deepspeed)

    def problems_of_blocks(block: Mapping[str, Any], *keys: str) -> list[str]:
        return [
            f'{name}: "{key}": {block[key]} must be a block of keys, as in `integration/deepspeed`'
            for key in keys
            if not isinstance(block.get(key) or {}, Mapping)
        ]

    problems = problems_of_blocks(settings, "zero_optimization", "bf16", "fp16")
    if problems:
        return problems
    zero = settings.get("zero_optimization") or {}
    problems = problems_of_blocks(zero, "offload_optimizer", "offload_param")
    if problems:
        return problems
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        return [f'{name}: "stage": {zero["stage"]} must be 0, 1, 2 or 3']
    if (settings.get("bf16") or {}).get("enabled") is True and run_dtype(cfg) != "bfloat16":
        problems.append(
            f'{name}: "bf16" is enabled, but the run computes in {run_dtype(cfg)}: write `bf16: true` in the YAML '
            'file, or "enabled": false here'
        )
    if zero.get("round_robin_gradients"):
        problems.append(f'{name}: "round_robin_gradients" is not supported: leave it out')
    problems += [
        f'{name}: "{key}" to nvme is not supported: write "device": "cpu", or leave it out'
        for key in ("offload_optimizer", "offload_param")
        if (zero.get(key) or {}).get("device") == "nvme"
    ]
    if "optimizer" in settings:
        problems.append(
            f'{name}: its "optimizer" block would replace `optimizer: {cfg.get("optimizer")}`: remove the block, and '
            "set `optimizer` and `learning_rate` in the YAML file"
        )
    if "scheduler" in settings and (cfg.get("spft") or {}).get("relative_step"):
        problems.append(
            f'{name}: its "scheduler" block has an absolute rate, and `relative_step: true` makes that of '
            "`learning_rate`: remove the block, and set `lr_scheduler` in the YAML file"
        )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if own_optimizer and offload != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        problems.append(
            f'{name}: "offload_optimizer" to {offload} would replace `optimizer: {cfg.get("optimizer")}` by '
            'DeepSpeed\'s own: add "zero_force_ds_cpu_optimizer": false'
        )
    if zero_stage(settings) == 3:
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            problems.append(
                f"{name}: without it each rank would save its part of the adapter only: set "
                '"stage3_gather_16bit_weights_on_model_save": true in "zero_optimization"'
            )
        if run_dtype(cfg) == "bfloat16" and (settings.get("bf16") or {}).get("enabled") is not True:
            problems.append(
                f'{name}: ZeRO-3 reads "bf16" when the model loads, before "auto" has a meaning, and would partition '
                'float32 weights: write "bf16": {"enabled": true}'
            )
        if cfg.get("load_in_8bit"):
            problems.append(
                "`load_in_8bit: true` cannot be partitioned by ZeRO-3, which would gather int8 weights as floating "
                "point: write `load_in_4bit: true`, or use ZeRO-2"
            )
        storage = (cfg.get("bnb_config_kwargs") or {}).get("bnb_4bit_quant_storage")
        if cfg.get("load_in_4bit") and storage not in (None, run_dtype(cfg)):
            problems.append(
                f"`bnb_config_kwargs: {{bnb_4bit_quant_storage: {storage}}}` differs from the run's {run_dtype(cfg)}, "
                "and ZeRO-3 gathers all parameters with one dtype: leave it out"
            )
        kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
        # Axolotl's default for preference training is the one that fails
        if cfg.get("gradient_checkpointing") and not kwargs.get("use_reentrant", not cfg.get("rl")):
            problems.append(
                "gradient checkpointing without re-entrance fails under ZeRO-3, which drops the weights between "
                "forward and backward: write `gradient_checkpointing_kwargs: {use_reentrant: true}`"
            )
    return problems
