"""A loss of Liger's that a trainer asks for, with a head that has sparse values."""

from __future__ import annotations

from typing import Any

from torch import nn

from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.called import CalledLayer


def refuse_fused_loss(trainer: Any, model: nn.Module) -> None:
    """Refuse a trainer whose loss multiplies by the weight of a targeted head, without calling the head.

    Losses outside of the model's forward pass, as TRL's DPO and GRPO have them, are seen by nothing else.

    Raises:
        SpftError: ``use_liger_kernel`` asks for one, and the head, or what it is tied to, is targeted.
    """
    asked = getattr(trainer.args, "use_liger_kernel", False)
    left_out = (getattr(trainer.args, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy") is False
    if not asked or (left_out and not hasattr(trainer, "ref_model")):
        return
    try:
        head = model.get_base_model().get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if isinstance(head, CalledLayer):
        raise SpftError(
            "`use_liger_kernel: true` has a loss that multiplies by the head's weight itself, without calling the "
            "head, so that its sparse values would miss that part of their gradient: leave it out, set "
            "`liger_kernel_config: {fused_linear_cross_entropy: false}` where that loss is the model's own, or leave "
            "the head, and an embedding that is tied to it, out of `target_modules`"
        )
