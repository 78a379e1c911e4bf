"""The run's learning rate in the unit in which rates compare between models and densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.step_unit import unit_of

_FORMULA = "rms(W) (0.005 / density)^0.75"


def absolute_learning_rate(
    trainer: Any,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    squares: Mapping[str, float],
    say: Callable[[str], None],
) -> float:
    """The rate that the optimizer is to have: ``args.learning_rate``, with ``relative_step`` times `step_unit`.

    The trainer's arguments stay as they are, since a run may fail before it has its mask, and others may have them too.

    Args:
        trainer: a `transformers.Trainer`.
        layers: of the model.
        squares: of the layers, from `axolotl_spft.tuner.step_unit.squares_of_weights`.
        say: takes the announcement, which has the rate in units of `step_unit` in any case.

    Raises:
        SpftError: the option is set, and the trainer has an optimizer with a rate of its own, or no weight can be read.
    """
    args = trainer.args
    if not config.relative_step:
        if squares and args.learning_rate:
            unit = unit_of(layers, config, squares)
            say(f"Learning rate: {args.learning_rate:g} = {args.learning_rate / unit:.2g} x {unit:g} ({_FORMULA})")
        return args.learning_rate
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.get_value("scheduler") is not None:
        raise SpftError(
            '`relative_step` sets the trainer\'s learning rate, and the DeepSpeed file has a "scheduler" of its own: '
            "leave that block out, and name a schedule in `lr_scheduler_type`"
        )
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise SpftError(
            "`relative_step` sets the trainer's learning rate, and its optimizer has one of its own: take "
            "`optimizer: sparse_adamw`, or leave `relative_step` out and give the optimizer a rate of so many "
            "axolotl_spft.step_unit(model)"
        )
    unit = unit_of(layers, config, squares)
    rate = args.learning_rate * unit
    say(f"Learning rate: {args.learning_rate:g} x {unit:g} ({_FORMULA}) = {rate:.4g}")
    return rate
