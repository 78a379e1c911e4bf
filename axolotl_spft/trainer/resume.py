"""A trainer that has begun already, and is to go on from a checkpoint as a new one would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from axolotl_spft.engine.kind import engine_of
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import slot_of
from axolotl_spft.salience.install import adapted_layers, check_same_mask
from axolotl_spft.salience.mask_file import load_masks
from axolotl_spft.trainer.checkpoints import ADAPTER_FILE
from axolotl_spft.trainer.reselection import restart_reselections
from axolotl_spft.trainer.salience_pass import peft_model_of
from axolotl_spft.trainer.saved_adapter import follow_repaired_start, install_checkpoint_mask, load_beside_reference
from axolotl_spft.tuner.state import shapes_of, slots_of

_ANEW = "make the model and the trainer anew, and resume with them"


def resume_begun(trainer: Any, checkpoint: str, own_optimizer: bool, say: Callable[[str], None]) -> None:
    """Give a trainer that `prepare_run` has prepared what belongs to a checkpoint, which it then resumes from.

    That is the checkpoint's mask, an optimizer and an engine without anything of before, and the history of a mask
    that changes; transformers loads the values and the optimizer's state afterwards.

    Args:
        trainer: a `transformers.Trainer` of a `PeftModel`.
        checkpoint: the folder of a complete checkpoint.
        own_optimizer: whether the trainer makes its optimizer itself, and so can make it again.
        say: takes each announcement; called on every rank.

    Raises:
        SpftError: DeepSpeed's engine holds values at other positions, or the checkpoint is of another kind of run.
        SpftFileError: the checkpoint does not fit.
    """
    model, ranks = peft_model_of(trainer), Ranks.current()
    if engine_of(trainer.accelerator).startswith("zero"):
        _check_mask_of_engine(model, checkpoint)
        return
    install_checkpoint_mask(model, checkpoint)
    follow_repaired_start(trainer, model)
    load_beside_reference(model, checkpoint)
    say(f"Sparse mask: the one of the checkpoint {checkpoint}, checksum {check_same_mask(model, ranks)[:16]}")
    if own_optimizer:
        trainer.optimizer = None
    chosen = trainer.optimizer_cls_and_kwargs
    if chosen is not None and "slots" in chosen[1]:
        chosen[1]["slots"] = slots_of(adapted_layers(model), model.active_adapter)
    # DDP's wrapper waits for the parameters that it was made with
    trainer.model_wrapped = trainer.model
    restart_reselections(trainer, model, checkpoint)


def _check_mask_of_engine(model: nn.Module, checkpoint: str) -> None:
    layers = adapted_layers(model)
    masks, _ = load_masks(Path(checkpoint) / ADAPTER_FILE, shapes_of(layers), f"To resume from it, {_ANEW}")
    if {name: slot_of(mask) for name, mask in masks.items()} != slots_of(layers, model.active_adapter):
        raise SpftError(
            f"{checkpoint} has another mask than the model now, whose values DeepSpeed's engine holds: {_ANEW}"
        )
