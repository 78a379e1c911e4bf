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

# read when an adapter is made, beside what its mask depends on
_OTHERS = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "mask_path", "lift_rank")


def check_lora_model_dir(cfg: Any) -> None:
    """Check that the adapter in ``lora_model_dir`` can be what a run starts from.

    Raises:
        SpftError: the run's trainer would not read it, it is an adapter of another kind, or the run asks for modules or
            biases to be trained that it does not hold.
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
    options, saved = cfg.spft or {}, SpftConfig.from_pretrained(cfg.lora_model_dir)
    asked = {
        "modules_to_save": sorted(set(options.get("modules_to_save") or ()) - set(saved.modules_to_save or ())),
        "bias": None if options.get("bias") in (None, saved.bias) else options["bias"],
    }
    for name, more in asked.items():
        if more:
            raise SpftError(
                f"`spft.{name}: {more}` is not trained by the adapter in `lora_model_dir`, which has "
                f"{getattr(saved, name)}: leave the key out, or merge that adapter first and name the result as "
                "`base_model`"
            )


def options_not_read(options: Mapping[str, Any], saved: SpftConfig) -> list[str]:
    """Options of the block ``spft`` that ask for something else than a saved adapter holds, a sentence each."""
    return [
        f"`spft.{name}: {options[name]}` is not read beside `lora_model_dir`, whose adapter has {_plain(held)}"
        for name in (*BUDGETS, *MASK_OPTIONS, *_OTHERS)
        if options.get(name) is not None and _differs(options[name], held := getattr(saved, name))
    ]


def _differs(asked: Any, held: Any) -> bool:
    # what a word or a regular expression means was resolved to names when the adapter was made
    if isinstance(asked, str) and isinstance(held, (list, set)):
        return False
    return _plain(asked) != _plain(held)


def _plain(value: Any) -> Any:
    """Names in an order, whatever they came in."""
    return sorted(value, key=str) if isinstance(value, (list, tuple, set)) else value


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
