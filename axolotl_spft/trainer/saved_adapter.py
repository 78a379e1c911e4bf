"""What a run takes from adapters that are there before it: a checkpoint's mask, and TRL's adapter to compare with."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from axolotl_spft.config import SpftConfig
from axolotl_spft.config_rules import BUDGETS
from axolotl_spft.errors import SpftError
from axolotl_spft.peft_type import SPFT
from axolotl_spft.salience.install import adapted_layers, install_masks, retire_empty_values
from axolotl_spft.salience.mask_file import load_masks, load_originals
from axolotl_spft.trainer.checkpoints import ADAPTER_FILE
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.record import read_record
from axolotl_spft.tuner.state import shapes_of

# what a mask depends on beside the budget and the targeted modules
MASK_OPTIONS = ("salience", "scope", "density_pattern", "min_density", "max_density", "pattern", "block_size",
                "samples", "score_after", "repair", "seed")  # fmt: skip
# as TRL names it
_REFERENCE = "ref"
# models whose reference is a copy that was made here
_copied: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# models whose reference is the model as it was repaired, before any training
_starts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_ANEW = "leave `resume_from_checkpoint` out and set another `output_dir` to start anew"


def copy_to_reference(model: nn.Module) -> None:
    """Make TRL's frozen adapter, which a trained one is compared with, the copy of the trained one that TRL means.

    TRL copies parameters whose names hold ``.default.``, as LoRA's do; those of a sparse adapter end in ``.default``,
    and have the sizes of its mask.
    """
    trained = model.active_adapter
    for layer in adapted_layers(model).values():
        values = layer.spft_values[trained].detach().clone()
        layer.set_mask(_REFERENCE, layer.mask(trained), values, layer.originals(trained))
    record_mask(model.base_model, _REFERENCE, model.peft_config[trained].mask_source)
    _copied.add(model)


def compares_with_a_copy(trainer: Any, model: nn.Module) -> bool:
    """Whether the adapter to compare with is TRL's: trainers of other losses leave one of that name alone."""
    return has_reference(model) and _compares_with_its_base(trainer)


def check_reference(trainer: Any, model: nn.Module) -> None:
    """Check that what a trainer of TRL's compares with is what TRL means, before anything is changed.

    Raises:
        SpftError: the reference is the base without the adapter, whose biases are trained in place while it is asked;
            or the model has another adapter of the reference's name, which the copy would overwrite.
    """
    if not _compares_with_its_base(trainer):
        return
    config = model.peft_config[model.active_adapter]
    if config.bias != "none" and not getattr(trainer.args, "precompute_ref_log_probs", False):
        raise SpftError(
            f"`bias: {config.bias}` trains the base model's own biases, and a {type(trainer).__name__} compares with "
            "that base, which would change as they do: leave `bias` out, or set `precompute_ref_log_probs: true`"
        )
    # TRL's own is empty, but where a config asks for random values
    filled = any(layer.has_values(_REFERENCE) for layer in adapted_layers(model).values())
    if filled and model not in _copied and model.peft_config[_REFERENCE].init_weights:
        raise SpftError(
            f"the model has an adapter `{_REFERENCE}` of its own, and a {type(trainer).__name__} gives that name to "
            f"the copy of `{model.active_adapter}` that it compares with: save it, take it out by "
            f'`model.delete_adapter("{_REFERENCE}")`, and load it under another name'
        )


def _compares_with_its_base(trainer: Any) -> bool:
    # trainers without a reference have no such attribute; with a `beta` of 0, none is asked
    return hasattr(trainer, "ref_model") and trainer.ref_model is None and getattr(trainer, "beta", 1) != 0


def compare_with_repaired_start(trainer: Any, model: nn.Module) -> None:
    """Let a trainer of TRL's that compares with a reference find a repaired model as its training starts.

    Without a filled adapter to compare with, the reference would be the quantized base without its repair.

    Raises:
        SpftError: the trainer has asked the reference already, or takes all adapters away for it.
    """
    trained = model.active_adapter
    is_repaired = any(trained in layer.spft_originals for layer in adapted_layers(model).values())
    if not is_repaired or not _compares_with_its_base(trainer):
        return
    if getattr(trainer.args, "precompute_ref_log_probs", False):
        raise SpftError(
            "`precompute_ref_log_probs: true` has asked the reference before the base was repaired: leave it out, or "
            "`repair`"
        )
    if not any(hasattr(sys.modules[kind.__module__], "use_adapter") for kind in type(trainer).__mro__):
        raise SpftError(
            f"a {type(trainer).__name__} compares with the base without any adapter, which `repair` is a part of: "
            "leave `repair` out, or use TRL's DPO, KTO, GRPO or RLOO trainer"
        )
    if not has_reference(model):
        model.add_adapter(_REFERENCE, model.peft_config[trained])
    copy_to_reference(model)
    for layer in adapted_layers(model).values():
        layer.values(_REFERENCE).data.zero_()
    retire_empty_values(model)
    _starts.add(model)


def follow_repaired_start(trainer: Any, model: nn.Module) -> None:
    """Bring the reference of `compare_with_repaired_start` to another mask that the model was given since."""
    if model in _starts:
        compare_with_repaired_start(trainer, model)


def has_reference(model: nn.Module) -> bool:
    """Whether the model has an adapter of the name that TRL's trainers give the one to compare with."""
    return _REFERENCE in model.peft_config


def load_beside_reference(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint's adapter where transformers does not: beside adapters in folders of their own."""
    if has_reference(model):
        model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)


def install_checkpoint_mask(model: nn.Module, checkpoint: str) -> None:
    """Give the adapter the mask of a checkpoint, and what its config records about it; the trainer loads the values.

    Raises:
        SpftError: it is of another kind, or has another number of values or other whole modules than the adapter's
            config asks for.
        SpftFileError: the mask does not fit the targeted modules.
    """
    check_kind(checkpoint, _ANEW)
    shapes = shapes_of(adapted_layers(model))
    path = Path(checkpoint) / ADAPTER_FILE
    masks, source = load_masks(path, shapes, f"Restore `target_modules`, or {_ANEW}")
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
    if recorded.bias != config.bias:
        raise SpftError(
            f"{checkpoint} holds `bias: {recorded.bias}`, but the run has {config.bias}: restore the option, or {_ANEW}"
        )
    # of older checkpoints, whose file has no record, the config tells
    options = read_record(path).get("options", {})
    for name in MASK_OPTIONS:
        setattr(config, name, options.get(name, getattr(recorded, name)))
    originals = load_originals(path, masks)
    install_masks(model, model.active_adapter, masks, source or recorded.mask_source or {}, originals)


def check_kind(folder: str, remedy: str) -> None:
    """Check that a folder holds a sparse adapter.

    Raises:
        SpftError: it holds one of another kind; ``remedy`` is the end of the sentence.
    """
    kind = PeftConfig._get_peft_type(folder)
    if kind != SPFT:
        raise SpftError(
            f"{folder} holds an adapter of the kind {kind}, but the run trains a sparse adapter (SPFT): {remedy}"
        )
