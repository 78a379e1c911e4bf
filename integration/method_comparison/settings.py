"""The settings of a run: PEFT's own defaults, and what an experiment's folder changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTER, TRAINING = "adapter_config.json", "training_params.json"
_DTYPES = ("float32", "float16", "bfloat16")
_FIXED = ("compile", "use_gc", "use_amp", "autocast_adapter_dtype", "lr_scheduler", "init_kv_cache_prefix")
# as method_comparison/MetaMathQA/default_training_params.json of PEFT has them: its results are compared at these
DEFAULTS: Mapping[str, Any] = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}


def read_settings(experiment: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings of an experiment's folder, with ``changes`` of the command line last.

    Raises:
        SystemExit: a file is missing or no JSON object, or a setting is unknown or not to be had here.
    """
    _json(experiment / ADAPTER)
    path = experiment / TRAINING
    settings = {**DEFAULTS, **(_json(path) if path.is_file() else {}), **changes}
    problems = [
        f"`{name}` is unknown: known are {', '.join(DEFAULTS)}" for name in sorted(set(settings) - set(DEFAULTS))
    ]
    if settings["dtype"] not in _DTYPES:
        problems.append(f"`dtype: {settings['dtype']}` must be one of {', '.join(_DTYPES)}")
    problems += [
        f"`{name}: {settings[name]}` is not to be had here: leave it at {DEFAULTS[name]}"
        for name in _FIXED
        if settings[name] != DEFAULTS[name]
    ]
    if problems:
        raise SystemExit("\n".join(f"{path}: {problem}" for problem in problems))
    return settings


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not isinstance(held, dict):
        raise SystemExit(f"{path} holds no JSON object")
    return held
