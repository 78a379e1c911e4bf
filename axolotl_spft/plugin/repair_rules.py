"""What of the option ``repair`` in an Axolotl configuration cannot work with its base, before the model loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_spft.checkpoint.base import check_unquantized
from axolotl_spft.checkpoint.shards import Shards, find_checkpoint
from axolotl_spft.errors import SpftFileError
from axolotl_spft.plugin.key_names import revision_of
from axolotl_spft.plugin.salience_rules import NOT_READABLE, config_of_base, kind_of_base


def problems_of_repair(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Every problem of the repair that ``cfg`` asks for, one sentence each; none where it asks for none.

    Args:
        cfg: the Axolotl configuration.
        options: its block ``spft``, each key of which keeps its own rule.
    """
    repair = options.get("repair")
    if not repair or _has_originals(cfg):
        return []
    key, problems = f"`repair: {repair}`", []
    asked = cfg.get("load_in_4bit") or cfg.get("load_in_8bit")
    kind = kind_of_base(cfg)
    if not asked and kind is None:
        problems.append(
            f"{key} spends values on the error of a quantized base, and nothing quantizes this one: set "
            "`load_in_4bit: true`, or leave it out"
        )
    elif kind in NOT_READABLE:
        problems.append(
            f"{key} replaces entries of the weights, and those of a base quantized by {kind.upper()} cannot be read or "
            "replaced: leave it out, or name the unquantized model in `base_model` and set `load_in_4bit: true`"
        )
    elif config_of_base(cfg).get("quantization_config") and not options.get("repair_from"):
        problems.append(
            f"{key} reads the unquantized weights, and `base_model: {cfg['base_model']}` was saved quantized: name the "
            "model before it was quantized in `repair_from`"
        )
    if cfg.get("precompute_ref_log_probs"):
        problems.append(
            f"{key} does not go with `precompute_ref_log_probs: true`, which asks the reference before the base is "
            "repaired: leave one of the two out"
        )
    return problems


def check_unquantized_weights(cfg: Mapping[str, Any]) -> None:
    """Check that there are files of the unquantized weights, where the run will read them.

    Raises:
        SpftFileError: there are none, or they were saved quantized.
    """
    options = cfg.get("spft") or {}
    if not options.get("repair") or _has_originals(cfg):
        return
    # a checkpoint has them as far as its mask stays
    if cfg.get("resume_from_checkpoint") and not options.get("reselect"):
        return
    source = options.get("repair_from")
    try:
        check_unquantized(Shards(find_checkpoint(source or cfg["base_model"], None if source else revision_of(cfg))))
    except SpftFileError as error:
        raise SpftFileError(
            f"`repair: {options['repair']}` reads the unquantized weights, but {error} (`repair_from`)"
        ) from error


def _has_originals(cfg: Mapping[str, Any]) -> bool:
    # a saved adapter has what it begins at
    return any(cfg.get(key) for key in ("lora_model_dir", "inference", "merge_lora"))
