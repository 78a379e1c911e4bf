"""The linear layer with a sparse delta, as one custom op with its backward.

    y  = x (W + S)^T + b
    dX = dY (W + S)
    dV = (dY[:, rows]^T X[:, columns])[mask]

W is not an argument: the op asks the layer that owns it for W + S, so that a plain weight needs no copy, a quantized
one is dequantized only while it is multiplied, and nothing of it is kept for backward. What backward keeps is the
columns of x that the mask uses.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.plan import Plan
from axolotl_spft.ops.values_grad import select_columns, values_grad


class Delta(NamedTuple):
    """Where the values of a sparse delta stand.

    Attributes:
        positions: (nnz) where they stand in the owner's flattened weight.
        originals: (nnz) what W holds there without S, or empty when the owner makes W + S afresh.
        plan: the `Plan` of the mask.
    """

    positions: Tensor
    originals: Tensor
    plan: Plan


class WeightOwner(Protocol):
    """What the op needs of a layer."""

    def effective_weight(self, values: Tensor, delta: Delta) -> Tensor:
        """W + S as (out_features, in_features), to be read at once."""

    def plain_weight(self) -> Tensor:
        """W as (out_features, in_features), to be read at once."""

    def effective_weight_again(self, values: Tensor, delta: Delta) -> AbstractContextManager[Tensor]:
        """The same for the backward pass: afterwards the layer is as it was before."""


_OWNERS: WeakValueDictionary[int, WeightOwner] = WeakValueDictionary()
_numbers = itertools.count(1)


def register_owner(owner: WeightOwner) -> int:
    """Give ``owner`` the number by which a compiled graph finds it; it is forgotten with its last reference."""
    number = next(_numbers)
    _OWNERS[number] = owner
    return number


def _owner(number: int) -> WeightOwner:
    owner = _OWNERS.get(number)
    if owner is None:
        raise SpftError("the layer of this sparse delta was deleted before its backward pass: keep the model alive")
    return owner


def _forward(x: Tensor, bias: Tensor | None, values: Tensor, delta: Delta, owner: WeightOwner) -> Tensor:
    return F.linear(x, owner.effective_weight(values, delta).to(x.dtype), bias)


def _backward(
    grad_y: Tensor,
    kept: Tensor,
    values: Tensor,
    delta: Delta,
    kept_columns: bool,
    owner: WeightOwner,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dX and dV; ``kept`` is x, or X[:, columns] where ``kept_columns``."""
    # once: attention hands over a transposed view, which both products would copy
    grad_y = grad_y.contiguous()
    grad_x = grad_values = None
    if need_x:
        with owner.effective_weight_again(values, delta) as weight:
            grad_x = grad_y.matmul(weight.to(grad_y.dtype))
    if need_values:
        x_columns = kept if kept_columns else select_columns(kept, delta.plan.columns)
        grad_values = values_grad(grad_y, x_columns, delta.plan).to(values.dtype)
    return grad_x, grad_values


def _bias_gradient(grad_y: Tensor) -> Tensor:
    return grad_y.sum(dim=tuple(range(grad_y.ndim - 1)))


class _EagerLinear(torch.autograd.Function):
    """The layer without the dispatcher, whose wrappers cost as much as a small product."""

    @staticmethod
    def forward(ctx, x, bias, values, delta, owner):
        y = _forward(x, bias, values, delta, owner)
        ctx.delta, ctx.owner, ctx.kept_columns = delta, owner, delta.plan.save_columns
        if not ctx.needs_input_grad[2]:
            ctx.save_for_backward(None, values)
        elif ctx.kept_columns:
            ctx.save_for_backward(select_columns(x, delta.plan.columns), values)
        else:
            ctx.save_for_backward(x, values)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        need_x, need_bias, need_values = ctx.needs_input_grad[:3]
        grad_x, grad_values = _backward(
            grad_y, *ctx.saved_tensors, ctx.delta, ctx.kept_columns, ctx.owner, need_x, need_values
        )
        return grad_x, _bias_gradient(grad_y) if need_bias else None, grad_values, None, None


class _FrozenLinear(torch.autograd.Function):
    """A layer without any delta, which keeps nothing at all for backward."""

    @staticmethod
    def forward(ctx, x, bias, owner):
        ctx.owner = owner
        return F.linear(x, owner.plain_weight().to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        grad_x = grad_y.matmul(ctx.owner.plain_weight().to(grad_y.dtype)) if ctx.needs_input_grad[0] else None
        return grad_x, _bias_gradient(grad_y) if ctx.needs_input_grad[1] else None, None


def frozen_linear(x: Tensor, bias: Tensor | None, owner: WeightOwner) -> Tensor:
    """y = x W^T + b, asking ``owner`` for W again in the backward pass; shapes as in `sparse_linear`."""
    return _FrozenLinear.apply(x, bias, owner)


# --- the same as a custom op, for torch.compile

_DELTA = (
    "Tensor values, Tensor positions, Tensor originals, Tensor rows, Tensor columns, Tensor slots, "
    "int[] row_stops, int[] value_stops"
)
_library = torch.library.Library("spft", "DEF")
_library.define(
    f"linear(Tensor x, Tensor? bias, {_DELTA}, bool save_columns, int out_features, int owner) -> (Tensor, Tensor)"
)
_library.define(
    f"linear_backward(Tensor grad_y, Tensor kept, {_DELTA}, bool save_columns, int in_features, int owner, "
    "bool need_x, bool need_values) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x, bias, values, positions, originals, rows, columns, slots, row_stops, value_stops, save_columns,
            out_features, owner):  # fmt: skip
    delta = Delta(positions, originals, Plan(rows, columns, slots, row_stops, value_stops, save_columns))
    y = _forward(x, bias, values, delta, _owner(owner))
    return y, select_columns(x, columns) if save_columns else x.new_empty(0)


@torch.library.register_fake("spft::linear", lib=_library)
def _linear_fake(x, bias, values, positions, originals, rows, columns, slots, row_stops, value_stops, save_columns,
                 out_features, owner):  # fmt: skip
    y = x.new_empty(*x.shape[:-1], out_features)
    return y, x.new_empty(x.numel() // x.shape[-1], columns.numel()) if save_columns else x.new_empty(0)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad_y, kept, values, positions, originals, rows, columns, slots, row_stops, value_stops,
                     save_columns, in_features, owner, need_x, need_values):  # fmt: skip
    delta = Delta(positions, originals, Plan(rows, columns, slots, row_stops, value_stops, save_columns))
    gradients = _backward(grad_y, kept, values, delta, save_columns, _owner(owner), need_x, need_values)
    return tuple(grad_y.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("spft::linear_backward", lib=_library)
def _linear_backward_fake(grad_y, kept, values, positions, originals, rows, columns, slots, row_stops, value_stops,
                          save_columns, in_features, owner, need_x, need_values):  # fmt: skip
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features) if need_x else grad_y.new_empty(0)
    return grad_x, torch.empty_like(values) if need_values else grad_y.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    x, _, values, *delta, row_stops, value_stops, save_columns, _, owner = inputs
    kept = (output[1] if save_columns else x) if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, values, *delta)
    ctx.rest = (row_stops, value_stops, save_columns, x.shape[-1], owner)
    ctx.set_materialize_grads(False)


def _op_gradients(ctx, grad_y: Tensor | None, _) -> tuple:
    others = (None,) * 10
    if grad_y is None:
        return (None, None, None, *others)
    kept, *delta = ctx.saved_tensors
    need_x, need_bias, need_values = ctx.needs_input_grad[:3]
    grad_x, grad_values = torch.ops.spft.linear_backward(
        grad_y, grad_y if kept is None else kept, *delta, *ctx.rest, need_x, need_values
    )
    return (
        grad_x if need_x else None,
        _bias_gradient(grad_y) if need_bias else None,
        grad_values if need_values else None,
        *others,
    )


torch.library.register_autograd("spft::linear", _op_gradients, setup_context=_setup_context, lib=_library)


def sparse_linear(
    x: Tensor, bias: Tensor | None, values: Tensor, delta: Delta, out_features: int, owner: WeightOwner, number: int
) -> Tensor:
    """y = x (W + S)^T + b.

    Args:
        x: (..., in_features).
        bias: (out_features) in the dtype of ``x``, or None.
        values: (nnz); receives a gradient.
        delta: where the values stand.
        owner: gives W + S.
        number: of the owner, from `register_owner`.

    Returns:
        (..., out_features) in the dtype of ``x``.
    """
    if not torch.compiler.is_compiling():
        return _EagerLinear.apply(x, bias, values, delta, owner)
    positions, originals, (*plan, save_columns) = delta
    save_columns = save_columns and torch.is_grad_enabled() and values.requires_grad
    return torch.ops.spft.linear(x, bias, values, positions, originals, *plan, save_columns, out_features, number)[0]
