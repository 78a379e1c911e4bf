"""The run's learning rate in the unit in which rates compare between models and densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.step_unit import unit_of

_FORMULA = "rms(W) (0.005 / density)^0.75"


def settle_learning_rate(
    trainer: Any,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    squares: Mapping[str, float],
    say: Callable[[str], None],
) -> None:
    """Say what the learning rate is in units of `step_unit`; with ``relative_step`` make it that many of them.

    Args:
        trainer: whose ``args.learning_rate`` becomes the absolute rate, which its logs then have.
        layers: of the model.
        squares: of the layers, from `axolotl_spft.tuner.step_unit.squares_of_weights`.
        say: takes the announcement.

    Raises:
        SpftError: the option is set, and the trainer has an optimizer with a rate of its own, or no weight can be read.
    """
    args = trainer.args
    if not config.relative_step:
        if squares and args.learning_rate:
            unit = unit_of(layers, config, squares)
            say(f"Learning rate: {args.learning_rate:g} = {args.learning_rate / unit:.2g} x {unit:g} ({_FORMULA})")
        return
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
    args.learning_rate, share = args.learning_rate * unit, args.learning_rate
    say(f"Learning rate: {share:g} x {unit:g} ({_FORMULA}) = {args.learning_rate:.4g}")
