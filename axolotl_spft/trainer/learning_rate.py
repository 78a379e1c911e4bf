"""The run's learning rate beside the size of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.weight_rms import rms_of


def settle_learning_rate(
    trainer: Any,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    squares: Mapping[str, float],
    say: Callable[[str], None],
) -> None:
    """Say what the learning rate is in units of rms(W); with ``relative_step`` make it that many of them.

    Args:
        trainer: whose ``args.learning_rate`` becomes the absolute rate, which its logs then have.
        layers: of the model.
        squares: of the layers, from `axolotl_spft.tuner.weight_rms.squares_of_weights`.
        say: takes the announcement.

    Raises:
        SpftError: the option is set, and the trainer has an optimizer with a rate of its own, or no weight can be read.
    """
    args = trainer.args
    if not config.relative_step:
        if squares and args.learning_rate:
            rms = rms_of(layers, squares)
            say(f"Learning rate: {args.learning_rate:g} = {args.learning_rate / rms:.2g} rms(W); rms(W) = {rms:g}")
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
            "axolotl_spft.weight_rms(model)"
        )
    rms = rms_of(layers, squares)
    args.learning_rate, share = args.learning_rate * rms, args.learning_rate
    say(f"Learning rate: {share:g} rms(W) = {args.learning_rate:.4g}; rms(W) = {rms:g}")
