"""Saved adapters that a run goes on from: the one in ``lora_model_dir``, and a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.schemas.enums import RLType
from peft import PeftConfig
from torch import nn

from axolotl_spft.config import BUDGETS, RECORDED, SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.peft_type import SPFT
from axolotl_spft.plugin.checkpoints import ADAPTER_FILE
from axolotl_spft.salience.install import adapted_layers, install_masks
from axolotl_spft.salience.mask_file import load_masks
from axolotl_spft.tuner.state import shapes_of

# what a mask depends on beside the budget and the targeted modules
_MASK_OPTIONS = ("salience", "scope", "density_pattern", "min_density", "max_density", "pattern", "block_size",
                 "samples", "score_after", "seed")  # fmt: skip
# as TRL names it
_REFERENCE = "ref"
_ANEW = "leave `resume_from_checkpoint` out and set another `output_dir` to start anew"


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
    _check_kind(
        cfg.lora_model_dir,
        "name a sparse adapter's folder in `lora_model_dir`, or merge this adapter first and name the result as "
        "`base_model`",
    )


def options_not_read(options: Mapping[str, Any], saved: SpftConfig) -> list[str]:
    """Options of the block ``spft`` that ask for something else than a saved adapter holds, a sentence each."""
    return [
        f"`spft.{name}: {options[name]}` is not read beside `lora_model_dir`, whose adapter has {getattr(saved, name)}"
        for name in (*BUDGETS, *_MASK_OPTIONS)
        if options.get(name) is not None and options[name] != getattr(saved, name)
    ]


def copy_to_reference(model: nn.Module) -> None:
    """Make TRL's frozen adapter, which a trained one is compared with, the copy of the trained one that TRL means.

    TRL copies parameters whose names hold ``.default.``, as LoRA's do; those of a sparse adapter end in ``.default``,
    and have the sizes of its mask.
    """
    trained = model.active_adapter
    for layer in adapted_layers(model).values():
        layer.set_mask(_REFERENCE, layer.mask(trained), layer.spft_values[trained].detach().clone())
    for recorded in RECORDED:
        setattr(model.peft_config[_REFERENCE], recorded, getattr(model.peft_config[trained], recorded))


def has_reference(model: nn.Module) -> bool:
    """Whether TRL's trainer has added an adapter to compare with."""
    return _REFERENCE in model.peft_config


def install_checkpoint_mask(model: nn.Module, checkpoint: str) -> None:
    """Give the adapter the mask of a checkpoint, and what its config records about it; the trainer loads the values.

    Raises:
        SpftError: it is of another kind, or has another number of values or other whole modules than the adapter's
            config asks for.
        SpftFileError: the mask does not fit the targeted modules.
    """
    _check_kind(checkpoint, _ANEW)
    shapes = shapes_of(adapted_layers(model))
    masks, _ = load_masks(
        Path(checkpoint) / ADAPTER_FILE, shapes, f"Restore `target_modules` of the block `spft`, or {_ANEW}"
    )
    config, recorded = model.peft_config[model.active_adapter], SpftConfig.from_pretrained(checkpoint)
    held = sum(mask.nnz for mask in masks.values())
    asked = config.allowed_counts(shapes)
    if held not in asked:
        key = next(name for name in BUDGETS if getattr(config, name) is not None)
        raise SpftError(
            f"{checkpoint} holds {held:,} values, but `{key}: {getattr(config, key)}` asks for {asked[-1]:,}: restore "
            f"the option (`num_values: {held}`), or {_ANEW}"
        )
    saved, asked_to_save = (set(each.modules_to_save or ()) for each in (recorded, config))
    if saved != asked_to_save:
        raise SpftError(
            f"{checkpoint} holds `modules_to_save: {sorted(saved)}`, but the run has {sorted(asked_to_save)}: restore "
            f"the option, or {_ANEW}"
        )
    for name in _MASK_OPTIONS:
        setattr(config, name, getattr(recorded, name))
    install_masks(model, model.active_adapter, masks, recorded.mask_source or {})


def _check_kind(folder: str, remedy: str) -> None:
    kind = PeftConfig._get_peft_type(folder)
    if kind != SPFT:
        raise SpftError(f"{folder} holds an adapter of the kind {kind}, but the run has `adapter: spft`: {remedy}")
