"""The saved adapter that a run goes on from: the one in ``lora_model_dir``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.schemas.enums import RLType

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
