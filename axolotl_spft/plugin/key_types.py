"""The kinds of value of those keys of Axolotl that are read here before Axolotl has checked them, or without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any


def _is_whole(value: Any) -> bool:
    # Axolotl takes a text of digits, and 2.0, for a number
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return int(value) == float(value)
    except (ValueError, OverflowError):
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


# what a value is, and how the rule is told
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("micro_batch_size", "batch_size", "gradient_accumulation_steps", "sequence_len"),
        (_is_whole, "a whole number, such as 2"),
    ),
    **dict.fromkeys(
        ("base_model", "output_dir", "lora_model_dir", "revision_of_model", "model_revision"),
        (_is_name, "one name or folder: write it as a text, in quotes where it is a number"),
    ),
    **dict.fromkeys(
        (
            "bnb_config_kwargs",
            "gradient_checkpointing_kwargs",
            "model_kwargs",
            "overrides_of_model_kwargs",
            "model_config",
            "overrides_of_model_config",
        ),
        (_is_block, "a block of keys, such as {key: value}"),
    ),
    "plugins": (_is_list, "a list, such as [axolotl_spft.SpftPlugin]"),
}


def problems_of_kinds(cfg: Mapping[str, Any]) -> list[str]:
    """Every key of a raw Axolotl configuration whose value is of a wrong kind, one sentence each."""
    problems = [
        f"`{key}: {cfg[key]}` must be {rule}"
        for key, (holds, rule) in _KINDS.items()
        if cfg.get(key) is not None and not holds(cfg[key])
    ]
    for key in ("model_kwargs", "overrides_of_model_kwargs"):
        inner = cfg[key].get("quantization_config") if _is_block(cfg.get(key)) else None
        if inner is not None and not _is_block(inner):
            problems.append(f"`{key}: {{quantization_config: {inner}}}` must be {_KINDS[key][1]}")
    return problems
