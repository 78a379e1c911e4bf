"""Targeted weights that something multiplies by past their layers: S would lack that part of its gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from axolotl_spft.errors import SpftError, listed
from axolotl_spft.ops.asked import asked_weight
from axolotl_spft.tuner.without_mask import is_choosing


class CalledLayer(BaseTunerLayer):
    """A tuner layer whose S has a gradient where the layer is called, and nowhere else.

    While a forward pass of the model runs with gradients on, and in compiled code, ``weight`` can be asked for dtype,
    shape and place, as models do, but a backward pass that comes to it raises `SpftError`: something has multiplied by
    it then. A layer without S is free, nn.MultiheadAttention's out_proj say, of which the salience pass finds that
    nothing is to be trained; not so one of a tied weight, whose other use that pass sees.
    """

    @property
    def weight(self) -> Tensor:
        # as PEFT's, which torch.compile cannot follow
        base_layer = self.get_base_layer()
        if hasattr(base_layer, "qweight"):
            return base_layer.qweight
        weight = base_layer.weight
        if not torch.is_grad_enabled():
            return weight
        owner = getattr(self, "owner", self)
        if not torch.compiler.is_compiling() and not _is_running(owner):
            return weight
        if not weight.is_floating_point() or not _takes_part(owner):
            return weight
        return asked_weight(weight, self, owner._owner)

    def refuse_product(self) -> NoReturn:
        """See `axolotl_spft.ops.asked`; a compiled graph knows the layer that has S alone, not who reads with it."""
        owner = getattr(self, "owner", self)
        writer = None if owner._writer is None else owner._writer()
        names = [] if writer is None else [writer.name_of(layer) for layer in (self, *getattr(self, "readers", ()))]
        raise SpftError(
            f"`target_modules` takes {listed(names) if names else 'a module'}, and the model or its loss multiplies by "
            "that weight itself, without calling the module, so that its values would miss that part of their "
            "gradient. Liger's fused linear cross entropy (`liger_fused_linear_cross_entropy`, `use_liger_kernel`) and "
            "CutCrossEntropy do that with a head: leave them out, or leave the module, and what is tied to it, out of "
            "`target_modules`"
        )


def _is_running(owner: Any) -> bool:
    """Whether a forward pass of the model runs."""
    writer = None if owner._writer is None else owner._writer()
    return writer is not None and writer.is_running


def _takes_part(owner: Any) -> bool:
    if owner.disable_adapters or owner.merged:
        return False
    is_tied = is_choosing() and isinstance(owner.get_base_layer(), nn.Embedding)
    return is_tied or bool(owner._filled_active_adapters())
