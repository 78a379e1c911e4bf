"""The saved adapter that a run goes on from: the one in ``lora_model_dir``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.schemas.enums import RLType

from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.checkpoint.trained_base import recorded_base
from axolotl_spft.config import SpftConfig
from axolotl_spft.config_rules import BUDGETS
from axolotl_spft.errors import SpftError
from axolotl_spft.trainer.saved_adapter import MASK_OPTIONS, check_kind


def check_lora_model_dir(cfg: Any) -> None:
    """Check that the adapter in ``lora_model_dir`` can be what a run starts from.

    Raises:
        SpftError: the run's trainer would not read it, or it is an adapter of another kind.
    """
    if not cfg.lora_model_dir:
        return
    rl = RLType(cfg.rl).value if cfg.rl else None
    if rl in ("dpo", "ipo", "kto") and not cfg.merge_lora:
        raise SpftError(
            f"`lora_model_dir: {cfg.lora_model_dir}` is not read under `rl: {rl}`, whose trainer makes the adapter "
            "itself: merge the adapter first (`axolotl merge-lora`) and name the result as `base_model`"
        )
    check_kind(
        cfg.lora_model_dir,
        "name a sparse adapter's folder in `lora_model_dir`, or merge this adapter first and name the result as "
        "`base_model`",
    )


def options_not_read(options: Mapping[str, Any], saved: SpftConfig) -> list[str]:
    """Options of the block ``spft`` that ask for something else than a saved adapter holds, a sentence each."""
    return [
        f"`spft.{name}: {options[name]}` is not read beside `lora_model_dir`, whose adapter has {getattr(saved, name)}"
        for name in (*BUDGETS, *MASK_OPTIONS)
        if options.get(name) is not None and options[name] != getattr(saved, name)
    ]


def commit_not_trained_on(cfg: Any, saved: SpftConfig, commit: str | None) -> list[str]:
    """A sentence where the base was loaded at another commit of the hub than the one of the adapter's training.

    Args:
        saved: the config of the adapter in ``lora_model_dir``.
        commit: the one that was loaded, where that is known.
    """
    if saved.base_model_name_or_path != cfg.base_model or not Path(cfg.lora_model_dir, WEIGHTS_FILE).is_file():
        return []
    trained = recorded_base(cfg.lora_model_dir).get("commit")
    if None in (trained, commit) or trained == commit:
        return []
    return [
        f"the adapter in `lora_model_dir` was trained on the commit {trained} of {cfg.base_model}, and this is "
        f"{commit}: set `revision_of_model: {trained}`, unless the weights are the same"
    ]
