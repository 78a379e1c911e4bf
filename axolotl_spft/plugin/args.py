"""The ``spft:`` block of an Axolotl configuration, and which other keys go with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from axolotl_spft.config_rules import check_options
from axolotl_spft.errors import SpftConfigError
from axolotl_spft.plugin.deepspeed_json import problems_of_deepspeed
from axolotl_spft.plugin.key_types import problems_of_kinds
from axolotl_spft.plugin.repair_rules import problems_of_repair
from axolotl_spft.plugin.reselect_run import problems_of_reselect
from axolotl_spft.plugin.salience_rules import problems_of_salience
from axolotl_spft.plugin.target_rules import problems_of_targets
from axolotl_spft.trainer.prepare import OPTIMIZERS
from axolotl_spft.tuner.experts import IMPLEMENTATIONS

ADAPTER = "spft"

# key: what to write instead, for keys that would silently do nothing or break
_FOREIGN_KEYS = {
    "lora_r": "set `spft.match_lora_rank`",
    "lora_alpha": "leave it out: sparse values are not scaled",
    "lora_dropout": "leave it out: sparse values are not dropped",
    "lora_target_modules": "set `spft.target_modules`",
    "lora_target_linear": "set `spft.target_modules: all-linear`",
    "lora_target_parameters": "set `spft.target_parameters`",
    "lora_exclude_modules": "set `spft.exclude_modules`",
    "peft_layers_to_transform": "set `spft.layers_to_transform`",
    "peft_layers_pattern": "set `spft.layers_pattern`",
    "peft_trainable_token_indices": (
        "leave it out: name the embedding in `spft.target_modules`, or train it whole with `spft.modules_to_save`"
    ),
    **dict.fromkeys(
        (
            "peft_use_dora",
            "peft_use_rslora",
            "peft_init_lora_weights",
            "peft_layer_replication",
            "lora_rank_pattern",
            "lora_alpha_pattern",
            "peft",
            "loraplus_lr_ratio",
            "loraplus_lr_embedding",
            "lora_on_cpu",
            "lora_fan_in_fan_out",
            "relora",
            "lora_embedding_kernel",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
        ),
        "leave it out: it belongs to LoRA",
    ),
    "loftq": "set `spft.repair`, which mends what quantization broke",
    "quantize_moe_experts": "leave it out: Axolotl quantizes experts for its LoRA adapters only, and here they stay in "
    "16 bits",
    "peft_ensure_weight_tying": "leave it out: tied weights always share one delta",
    "unfrozen_parameters": "set `spft.modules_to_save`: base weights stay frozen under `adapter: spft`",
}
# what keys have that nobody wrote, in a configuration that Axolotl has completed
_SET_BY_AXOLOTL = {"loraplus_lr_embedding": 1e-6}
_UNSUPPORTED = {
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "fsdp_version"),
        "leave it out: `adapter: spft` does not train under FSDP; shard with `deepspeed` and ZeRO-3 instead",
    ),
    **dict.fromkeys(
        (
            "tensor_parallel_size",
            "context_parallel_size",
            "sequence_parallel_degree",
            "expert_parallel_size",
            "dp_shard_size",
        ),
        "leave it out: `adapter: spft` trains data-parallel only (DDP, DeepSpeed ZeRO-1, 2, 3)",
    ),
}


# they orthogonalize the update of a matrix
_OF_MATRICES = ("muon", "dion")


def check_run(cfg: Mapping[str, Any]) -> list[str]:
    """Every problem of a whole Axolotl configuration with ``adapter: spft``, one sentence each."""
    options = cfg.get("spft")
    if cfg.get("adapter") != ADAPTER:
        problems = []
        if options is not None:
            problems.append(f"the block `spft` needs `adapter: spft`, but the adapter is `{cfg.get('adapter')}`")
        if str(cfg.get("optimizer")) in OPTIMIZERS:
            problems.append(
                f"`optimizer: {cfg['optimizer']}` needs `adapter: spft`: use an optimizer such as adamw_torch"
            )
        return problems
    if options is not None and not isinstance(options, Mapping):
        return [f"`spft: {options}` must be a block of keys"]
    options = options or {}
    problems = problems_of_kinds(cfg)
    if problems:
        return problems + check_options(options)
    problems = check_options(options)
    if not problems:
        problems = problems_of_salience(cfg, options) + problems_of_repair(cfg, options)
        problems += problems_of_reselect(cfg, options) + problems_of_targets(cfg, options)
    if options.get("init_weights") is False:
        problems.append(
            "`init_weights: False` would train random values at random positions: leave it out (`salience: random` "
            "trains random positions, from 0)"
        )
    problems += _problems_of_experts(cfg, options)
    optimizer = str(cfg.get("optimizer") or "")
    if optimizer.startswith("sparse_") and optimizer not in OPTIMIZERS:
        problems.append(f"`optimizer: {optimizer}` must be {' or '.join(OPTIMIZERS)} or a Hugging Face optimizer name")
    if optimizer in OPTIMIZERS and cfg.get("optim_args"):
        problems.append(
            f"`optim_args: {cfg['optim_args']}` is not read by `optimizer: {optimizer}`: set `adam_beta1`, "
            "`adam_beta2`, `adam_epsilon` and `weight_decay`"
        )
    if optimizer in _OF_MATRICES:
        problems.append(
            f"`optimizer: {optimizer}` trains matrices only, and the values of a sparse adapter are vectors: use "
            f"{' or '.join(OPTIMIZERS)}, or another optimizer of single values such as adamw_torch"
        )
    if cfg.get("inference") and not cfg.get("lora_model_dir"):
        problems.append(
            "`lora_model_dir` is not set, so there is no trained adapter to load: "
            f"add `lora_model_dir: {cfg.get('output_dir')}`, or pass --lora-model-dir"
        )
    if cfg.get("load_in_4bit") and cfg.get("load_in_8bit"):
        problems.append("`load_in_4bit: true` and `load_in_8bit: true` exclude each other: keep one")
    if cfg.get("merge_method") == "memory_efficient":
        problems.append(
            "`merge_method: memory_efficient` knows LoRA only: write `merge_method: legacy`, the default here"
        )
    problems += [
        f"`{key}: {cfg[key]}` has no meaning with `adapter: spft`: {remedy}"
        for key, remedy in _FOREIGN_KEYS.items()
        if cfg.get(key) and cfg[key] != _SET_BY_AXOLOTL.get(key)
    ]
    saved = cfg.get("lora_modules_to_save")
    if saved and saved != options.get("modules_to_save"):
        problems.append(
            f"`lora_modules_to_save: {saved}` differs from `spft.modules_to_save: {options.get('modules_to_save')}`, "
            "of which the plugin makes it: leave it out, and set `spft.modules_to_save`"
        )
    problems += [
        f"`{key}: {cfg[key]}`: {remedy}"
        for key, remedy in _UNSUPPORTED.items()
        # one rank of a kind of parallelism is none of it
        if cfg.get(key) and (key.startswith("fsdp") or cfg[key] != 1)
    ]
    if cfg.get("save_only_model") and (cfg.get("resume_from_checkpoint") or cfg.get("auto_resume_from_checkpoints")):
        problems.append(
            "`save_only_model: true` writes checkpoints without optimizer state, which cannot be resumed: leave it "
            "out, or go on from one with `lora_model_dir`"
        )
    problems += problems_of_launcher(cfg)
    if cfg.get("deepspeed"):
        problems += problems_of_deepspeed(cfg, optimizer in OPTIMIZERS)
    return problems


def _problems_of_experts(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Ways to compute experts of which it is not known whether they make the gradient of the experts' weights."""
    if not options.get("target_parameters"):
        return []
    asked = [key for key in ("use_scattermoe", "use_sonicmoe") if cfg.get(key)]
    if cfg.get("experts_implementation") not in (None, *IMPLEMENTATIONS):
        asked.append("experts_implementation")
    if cfg.get("expert_backend") in ("scattermoe", "sonicmoe"):
        asked.append("expert_backend")
    return [
        f"`{key}: {cfg[key]}` computes the experts by a kernel that may give no gradient of their weights, which "
        f"`spft.target_parameters` needs: write `experts_implementation: {IMPLEMENTATIONS[-1]}`, or leave one out"
        for key in asked
    ]


def problems_of_launcher(cfg: Mapping[str, Any]) -> list[str]:
    """An engine that accelerate's own configuration switches on, behind the keys of the run."""

    def asked(variable: str) -> bool:
        return os.environ.get(variable, "false").lower() in ("true", "1")

    problems = []
    if asked("ACCELERATE_USE_FSDP"):
        problems.append(
            "accelerate's configuration asks for FSDP, under which `adapter: spft` does not train: launch with "
            "`integration/accelerate/one_node.yml` and set `deepspeed`"
        )
    if asked("ACCELERATE_USE_DEEPSPEED") and not cfg.get("deepspeed"):
        problems.append(
            "accelerate's configuration asks for DeepSpeed, but the key `deepspeed` is not set: name the JSON file "
            "there, and launch with `integration/accelerate/one_node.yml`"
        )
    return problems


class SpftArgs(BaseModel):
    """The plugin's part of Axolotl's configuration.

    Raises:
        pydantic.ValidationError: with all problems of `check_run` at once, before any model loads.
    """

    spft: dict[str, Any] | None = Field(
        default=None,
        description="Sparse fine-tuning: the fields of `axolotl_spft.SpftConfig`, see axolotl_spft/README.md.",
    )

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        problems = check_run(data)
        if problems:
            raise SpftConfigError(problems)
        return data
