"""From a `transformers.Trainer` that was just made to one that can train: the mask, the optimizer, the records."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from axolotl_spft.engine.kind import engine_of
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import gather_as_unit, gather_beside
from axolotl_spft.errors import SpftError
from axolotl_spft.optim import SparseAdamW
from axolotl_spft.salience.install import adapted_layers, check_same_mask, retire_empty_values
from axolotl_spft.trainer.checkpoints import RunRecord
from axolotl_spft.trainer.fused_loss import refuse_fused_loss
from axolotl_spft.trainer.learning_rate import absolute_learning_rate
from axolotl_spft.trainer.memory import memory_of_run
from axolotl_spft.trainer.model_card import keep_section_of_card
from axolotl_spft.trainer.put_back import put_back_on_failure
from axolotl_spft.trainer.reselection import add_reselections, check_reselect
from axolotl_spft.trainer.salience_pass import has_mask, peft_model_of, select_mask_with_trainer
from axolotl_spft.trainer.saved_adapter import (
    check_reference,
    compare_with_repaired_start,
    compares_with_a_copy,
    copy_to_reference,
    install_checkpoint_mask,
    load_beside_reference,
)
from axolotl_spft.trainer.watch import watch_training
from axolotl_spft.tuner.experts import SpftExperts
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import slots_of
from axolotl_spft.tuner.step_unit import squares_of_weights
from axolotl_spft.tuner.tied import TiedLayer

# name: precision of the moments
OPTIMIZERS = {"sparse_adamw": 32, "sparse_adamw_8bit": 8}

_prepared: weakref.WeakSet[Any] = weakref.WeakSet()
# whose adapter had no mask when they were first asked to train; a try that then failed may have given it one
_began_empty: weakref.WeakSet[Any] = weakref.WeakSet()


def prepare_run(trainer: Any, checkpoint: str | None, optimizer: str | None, say: Callable[[str], None]) -> None:
    """Give the trainer's adapter its mask, and the trainer the optimizer for it, before it trains.

    The mask is the checkpoint's, or the one that the adapter has, or is chosen by `select_mask_with_trainer`. Where
    that fails, or is interrupted, the trainer and its arguments are as before, and it can be tried again.

    Args:
        trainer: a `transformers.Trainer` of a `PeftModel`.
        checkpoint: the folder that it will resume from.
        optimizer: ``sparse_adamw`` or ``sparse_adamw_8bit``; with another name, or None, the trainer makes its own.
        say: takes each announcement; called on every rank.

    Raises:
        SpftError: the mask cannot be chosen, or the ranks hold different ones.
        SpftFileError: the checkpoint does not fit.
    """
    model, ranks, engine = peft_model_of(trainer), Ranks.current(), engine_of(trainer.accelerator)
    if engine == "zero3":
        _check_tied(model)
    refuse_fused_loss(trainer, model)
    check_reference(trainer, model)
    is_saved = has_mask(model)
    if not is_saved:
        _began_empty.add(trainer)
    reselect = model.peft_config[model.active_adapter].reselect is not None
    if reselect:
        check_reselect(trainer, model.peft_config[model.active_adapter], engine, optimizer in OPTIMIZERS)
    if trainer not in _began_empty and compares_with_a_copy(trainer, model):
        copy_to_reference(model)
    if checkpoint:
        install_checkpoint_mask(model, checkpoint)
        if trainer in _began_empty:
            compare_with_repaired_start(trainer, model)
        load_beside_reference(model, checkpoint)
    say(str(memory_of_run(model, trainer.args, engine, ranks, OPTIMIZERS.get(optimizer or "", 32))))
    layers = adapted_layers(model)
    squares = squares_of_weights(layers, show=ranks.rank == 0)
    if optimizer not in OPTIMIZERS:
        _tell_of_rounding(layers, model.active_adapter, say)
    rate = absolute_learning_rate(trainer, model.peft_config[model.active_adapter], layers, squares, say)
    if checkpoint:
        say(f"Sparse mask: the one of the checkpoint {checkpoint}")
    elif is_saved:
        retire_empty_values(model)
        say("Sparse mask: the one of the adapter that was loaded")
    else:
        say(str(select_mask_with_trainer(trainer, model, rate)))
    if not checkpoint and trainer in _began_empty:
        compare_with_repaired_start(trainer, model)
    say(f"Sparse mask: checksum {check_same_mask(model, ranks)[:16]} on all {ranks.world} ranks")
    if engine == "zero3":
        gather_what_layers_read(model)
    with put_back_on_failure(trainer):
        if rate != trainer.args.learning_rate:
            # of its own: other trainers may have been given the same ones
            trainer.args = copy.copy(trainer.args)
            trainer.args.learning_rate = rate
        trainer.add_callback(RunRecord(ranks.world, engine, reselect))
        if optimizer in OPTIMIZERS:
            slots = slots_of(layers, model.active_adapter)
            trainer.optimizer_cls_and_kwargs = _optimizer(trainer.args, OPTIMIZERS[optimizer], slots)
        watch_training(trainer, model, ranks, squares)
        if reselect:
            add_reselections(trainer, model, checkpoint, say)
        keep_section_of_card(trainer)
        _prepared.add(trainer)


def _tell_of_rounding(layers: Mapping[str, SparseLayer], adapter: str, say: Callable[[str], None]) -> None:
    """TRL's trainers make what is trained on a quantized base bfloat16."""
    dtypes = {layer.spft_values[adapter].dtype for layer in layers.values()}
    if dtypes & {torch.bfloat16, torch.float16}:
        say(
            f"Sparse values: {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}, which rounds "
            "small updates away: `sparse_adamw`, the default of `SpftCallback()`, keeps a float32 copy of each"
        )


def is_prepared(trainer: Any) -> bool:
    """Whether `prepare_run` has been here, which a trainer wants once, however often it trains."""
    return trainer in _prepared


def _check_tied(model: nn.Module) -> None:
    tied = [name for name, module in model.named_modules() if isinstance(module, TiedLayer)]
    if tied and not ties_in_zero3():
        raise SpftError(
            f"{tied[0]} is tied to another module, and DeepSpeed {version('deepspeed')} gives the values of their one "
            "delta another gradient under ZeRO-3 than one process: install deepspeed<0.19, use ZeRO-2 or DDP, or leave "
            "it out of `target_modules`"
        )


def ties_in_zero3() -> bool:
    """Whether the installed DeepSpeed's ZeRO-3 gives what two modules share the gradient of both."""
    return Version(version("deepspeed")) < Version("0.19")


def gather_what_layers_read(model: nn.Module) -> None:
    """Let ZeRO-3, whose engine is made later, gather what a sparse layer reads of other modules whenever it runs."""
    for module in model.modules():
        if isinstance(module, (SparseLayer, SpftExperts, TiedLayer)):
            gather_beside(module, module.parameters())
        if isinstance(module, TiedLayer):
            gather_beside(module, module.owner.spft_values.parameters())
    blocks = [
        module for module in model.modules() if any(isinstance(child, SpftExperts) for child in module.children())
    ]
    for block in blocks:
        gather_as_unit(block)
    if blocks and hasattr(model, "enable_input_require_grads"):
        # the gradients of such a block are taken when that of its input is there, so there must be one
        model.enable_input_require_grads()


def _optimizer(args: Any, state_bits: int, slots: dict) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "state_bits": state_bits,
        "slots": slots,
    }
    return SparseAdamW, kwargs
