"""The product with W alone, of a layer whose weight holds W + S at other times.

    y   = x W^T + b
    dX  = dY W
    ddY = ddX W^T, where dX itself is differentiated, and so on

autograd would keep the weight for dX, and multiply by whatever it holds when the backward pass comes by: by W + S,
where that pass is also one of a forward pass with S. As in `axolotl_spft.ops.linear`, the op asks the layer each time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from axolotl_spft.ops.backends.products import cast, linear, matmul
from axolotl_spft.ops.linear import bias_gradient, owner_of


class FrozenOwner(Protocol):
    """What the op needs of a layer."""

    def plain_weight(self) -> AbstractContextManager[Tensor]:
        """W as (out_features, in_features), to be read within the block."""


def _forward(x: Tensor, bias: Tensor | None, owner: FrozenOwner) -> Tensor:
    with owner.plain_weight() as weight:
        return linear(x, cast(weight, x.dtype), bias)


def _backward(grad_y: Tensor, owner: FrozenOwner) -> Tensor:
    with owner.plain_weight() as weight:
        return matmul(grad_y, cast(weight, grad_y.dtype))


class _EagerFrozen(torch.autograd.Function):
    """The layer without the dispatcher; it keeps nothing at all for backward."""

    @staticmethod
    def forward(ctx, x, bias, owner):
        ctx.owner = owner
        return _forward(x, bias, owner)

    @staticmethod
    def backward(ctx, grad_y):
        need_x, need_bias = ctx.needs_input_grad[:2]
        grad_x = None
        if need_x:
            backward = _EagerBackward.apply if torch.is_grad_enabled() else _backward
            grad_x = backward(grad_y, ctx.owner)
        return grad_x, bias_gradient(grad_y) if need_bias else None, None


class _EagerBackward(torch.autograd.Function):
    """dX, where it is to be differentiated again."""

    @staticmethod
    def forward(ctx, grad_y, owner):
        ctx.owner = owner
        return _backward(grad_y, owner)

    @staticmethod
    def backward(ctx, grad_grad_x):
        return _EagerFrozen.apply(grad_grad_x, None, ctx.owner), None


# --- the same as custom ops, for torch.compile

_library = torch.library.Library("spft", "FRAGMENT")
_library.define("frozen_linear(Tensor x, Tensor? bias, int out_features, int owner) -> Tensor")
_library.define("frozen_linear_backward(Tensor grad_y, int in_features, int owner) -> Tensor")


@torch.library.impl(_library, "frozen_linear", "CompositeExplicitAutograd")
def _frozen_linear(x, bias, out_features, owner):
    return _forward(x, bias, owner_of(owner))


@torch.library.register_fake("spft::frozen_linear", lib=_library)
def _frozen_linear_fake(x, bias, out_features, owner):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.impl(_library, "frozen_linear_backward", "CompositeExplicitAutograd")
def _frozen_linear_backward(grad_y, in_features, owner):
    return _backward(grad_y, owner_of(owner))


@torch.library.register_fake("spft::frozen_linear_backward", lib=_library)
def _frozen_linear_backward_fake(grad_y, in_features, owner):
    return grad_y.new_empty(*grad_y.shape[:-1], in_features)


def _setup_context(ctx, inputs, output) -> None:
    x, _, _, ctx.owner = inputs
    ctx.in_features = x.shape[-1]


def _op_gradients(ctx, grad_y: Tensor) -> tuple:
    need_x, need_bias = ctx.needs_input_grad[:2]
    grad_x = torch.ops.spft.frozen_linear_backward(grad_y, ctx.in_features, ctx.owner) if need_x else None
    return grad_x, bias_gradient(grad_y) if need_bias else None, None, None


torch.library.register_autograd("spft::frozen_linear", _op_gradients, setup_context=_setup_context, lib=_library)


def _setup_context_of_backward(ctx, inputs, output) -> None:
    grad_y, _, ctx.owner = inputs
    ctx.out_features = grad_y.shape[-1]


def _op_gradients_of_backward(ctx, grad_grad_x: Tensor) -> tuple:
    return torch.ops.spft.frozen_linear(grad_grad_x, None, ctx.out_features, ctx.owner), None, None


torch.library.register_autograd(
    "spft::frozen_linear_backward",
    _op_gradients_of_backward,
    setup_context=_setup_context_of_backward,
    lib=_library,
)


def frozen_linear(x: Tensor, bias: Tensor | None, out_features: int, owner: FrozenOwner, number: int) -> Tensor:
    """y = x W^T + b, which can be differentiated any number of times.

    Args:
        x: (..., in_features).
        bias: (out_features) in the dtype of ``x``, or None.
        owner: gives W.
        number: of the owner, from `axolotl_spft.ops.linear.register_owner`.

    Returns:
        (..., out_features) in the dtype of ``x``.
    """
    if not torch.compiler.is_compiling():
        return _EagerFrozen.apply(x, bias, owner)
    return torch.ops.spft.frozen_linear(x, bias, out_features, number)
