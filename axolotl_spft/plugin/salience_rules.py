"""What of the salience in an Axolotl configuration cannot work with its engine and base, before the model loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.deepspeed_json import read_deepspeed_json, zero_stage
from axolotl_spft.plugin.key_names import of_two_names, revision_of
from axolotl_spft.salience.metrics.metric import OF_ALL_MATRICES, OF_WEIGHT, load_metric, problem_with_experts

# kinds of quantized weights that can be multiplied but not read
NOT_READABLE = ("gptq", "awq", "aqlm", "eetq")


def problems_of_salience(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Every problem of the salience pass that ``cfg`` asks for, one sentence each; none where it asks for none.

    Args:
        cfg: the Axolotl configuration.
        options: its block ``spft``, each key of which keeps its own rule.
    """
    if has_its_mask(cfg, options):
        return []
    try:
        metric = load_metric(options.get("salience") or "gradient")
    except SpftError as error:
        return [str(error)]
    experts = options.get("target_parameters")
    found = problem_with_experts(metric, ", ".join(experts)) if experts else None
    problems, steps, memory = [], options.get("score_after"), options.get("salience_memory_gib")
    if found:
        problems.append(found)
    if steps and stage_of(cfg) == 3:
        problems.append(
            f"`score_after: {steps}` trains before DeepSpeed's engine exists, when ZeRO-3 has partitioned the weights "
            "already: use ZeRO-1, ZeRO-2 or DDP, or make the mask there and name it in `mask_path`"
        )
    if steps and metric.needs & OF_ALL_MATRICES:
        problems.append(
            f"`score_after: {steps}` has no meaning with `salience: {metric.name}`, which is defined at the pretrained "
            "weights: leave it out, or use another salience"
        )
    if memory is not None and metric.needs & OF_ALL_MATRICES:
        problems.append(
            f"`salience_memory_gib: {memory}` cannot be kept with `salience: {metric.name}`, which needs its sums for "
            "all matrices at once: leave it out, or use another salience"
        )
    kind = kind_of_base(cfg)
    if kind in NOT_READABLE and metric.needs & OF_WEIGHT:
        problems.append(
            f"`salience: {metric.name}` reads the weights, and those of a base quantized by {kind.upper()} cannot be "
            "read: use `salience: gradient`, `balanced` or `fisher`, or another base"
        )
    return problems


def has_its_mask(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a run finds its mask in a file, so that no salience pass runs; see `problems_of_salience`."""
    mask = options.get("mask_path")
    saved = any(cfg.get(key) for key in ("lora_model_dir", "inference", "merge_lora", "resume_from_checkpoint"))
    return saved or (mask is not None and Path(mask).expanduser().is_file())


def stage_of(cfg: Mapping[str, Any]) -> int | None:
    """The ZeRO stage of the run; None without DeepSpeed."""
    try:
        return zero_stage(read_deepspeed_json(cfg["deepspeed"])) if cfg.get("deepspeed") else None
    except (AttributeError, TypeError, ValueError):
        # told by the rules of DeepSpeed's own configuration
        return None


def kind_of_base(cfg: Mapping[str, Any]) -> str | None:
    """How the base is quantized, as far as the keys and a config.json on this machine tell."""
    if cfg.get("gptq"):
        return "gptq"
    found = asked_quantization(cfg) or config_of_base(cfg).get("quantization_config")
    return str(found.get("quant_method")).lower() if isinstance(found, Mapping) else None


def asked_quantization(cfg: Mapping[str, Any]) -> Any:
    """The settings that the model is loaded with, by Axolotl's general keys; None where it is not told."""
    return (of_two_names(cfg, "overrides_of_model_kwargs") or {}).get("quantization_config")


def config_of_base(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the run's base model; empty where this machine has none."""
    from huggingface_hub import try_to_load_from_cache

    base_model = str(cfg.get("base_model") or "")
    path: Any = Path(base_model, "config.json")
    try:
        if not path.is_file():
            path = try_to_load_from_cache(base_model, "config.json", revision=revision_of(cfg))
        found = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, (str, Path)) else {}
    except (OSError, ValueError):
        # no name of a model, or no such file: said when the model loads
        return {}
    return found if isinstance(found, Mapping) else {}
