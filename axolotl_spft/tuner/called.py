"""Targeted weights that something multiplies by past their layers: S would lack that part of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.without_mask import is_choosing


class CalledLayer(BaseTunerLayer):
    """A tuner layer whose S has a gradient where the layer is called, and nowhere else.

    While a forward pass trains the model, ``weight`` can be asked for dtype, shape and place, as models do, but a
    backward pass that comes to it raises `SpftError`: something has multiplied by it then. A layer without S is free,
    nn.MultiheadAttention's out_proj say, of which the salience pass finds that nothing is to be trained; not so one of
    a tied weight, whose other use that pass sees.
    """

    @property
    def weight(self) -> Tensor:
        weight = super().weight
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return weight
        owner = getattr(self, "owner", self)
        writer = None if owner._writer is None else owner._writer()
        if writer is None or not writer.is_running or not weight.is_floating_point() or not _takes_part(owner):
            return weight
        return _OnlyAsked.apply(weight, torch.zeros((), requires_grad=True), lambda: writer.name_of(self))


def _takes_part(owner: Any) -> bool:
    if owner.disable_adapters or owner.merged:
        return False
    is_tied = is_choosing() and isinstance(owner.get_base_layer(), nn.Embedding)
    return is_tied or bool(owner._filled_active_adapters())


class _OnlyAsked(torch.autograd.Function):
    """W itself, which nothing may be computed with that has a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, name: Callable[[], str]) -> Tensor:
        ctx.name = name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise SpftError(
            f"`target_modules` takes {ctx.name()}, and the model or its loss multiplies by that weight itself, without "
            "calling the module, so that its values would miss that part of their gradient. Liger's fused linear cross "
            "entropy (`liger_fused_linear_cross_entropy`, `use_liger_kernel`) and CutCrossEntropy do that with a head: "
            "leave them out, or leave the module, and what is tied to it, out of `target_modules`"
        )
