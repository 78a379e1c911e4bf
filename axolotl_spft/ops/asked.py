"""W as it may be asked for dtype, shape and place: a backward pass that comes to it is an error of its owner."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from axolotl_spft.ops.linear import owner_of


class AskedOwner(Protocol):
    """What the op needs of a layer."""

    def refuse_product(self) -> NoReturn:
        """Raise: something has multiplied by W without the layer."""


# W itself is frozen: this is what makes autograd come by
_trained = torch.zeros((), requires_grad=True)


class _EagerAsked(torch.autograd.Function):
    """W itself, not a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, trained: Tensor, owner: AskedOwner) -> Tensor:
        ctx.owner = owner
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        ctx.owner.refuse_product()


# --- the same as custom ops, for torch.compile

_library = torch.library.Library("spft", "FRAGMENT")
_library.define("asked(Tensor weight, Tensor trained, int owner) -> Tensor")
_library.define("asked_backward(Tensor grad, int owner) -> Tensor")


@torch.library.impl(_library, "asked", "CompositeExplicitAutograd")
def _asked(weight, trained, owner):
    # an op may not return what it was given; one that is asked for its dtype alone is not in the compiled graph
    return weight.clone()


@torch.library.register_fake("spft::asked", lib=_library)
def _asked_fake(weight, trained, owner):
    return torch.empty_like(weight)


@torch.library.impl(_library, "asked_backward", "CompositeExplicitAutograd")
def _asked_backward(grad, owner):
    owner_of(owner).refuse_product()


@torch.library.register_fake("spft::asked_backward", lib=_library)
def _asked_backward_fake(grad, owner):
    return torch.empty((), dtype=_trained.dtype, device=_trained.device)


def _setup_context(ctx, inputs, output) -> None:
    *_, ctx.owner = inputs


def _op_gradients(ctx, grad: Tensor) -> tuple:
    return None, torch.ops.spft.asked_backward(grad, ctx.owner), None


torch.library.register_autograd("spft::asked", _op_gradients, setup_context=_setup_context, lib=_library)


def asked_weight(weight: Tensor, owner: AskedOwner, number: int) -> Tensor:
    """W, which nothing that has a gradient may multiply by.

    Args:
        weight: W as it is stored, frozen.
        owner: who refuses; in a compiled graph that is the one with the number.
        number: from `axolotl_spft.ops.linear.register_owner`.
    """
    if not torch.compiler.is_compiling():
        return _EagerAsked.apply(weight, _trained, owner)
    return torch.ops.spft.asked(weight, _trained, number)
