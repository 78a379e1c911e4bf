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
from typing import Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.plan import Plan
from axolotl_spft.ops.values_grad import select_columns, values_grad


class WeightOwner(Protocol):
    """What the op needs of a layer."""

    def effective_weight(self, values: Tensor, positions: Tensor, originals: Tensor) -> Tensor:
        """W + S as (out_features, in_features), to be read at once."""

    def effective_weight_again(
        self, values: Tensor, positions: Tensor, originals: Tensor
    ) -> AbstractContextManager[Tensor]:
        """The same for the backward pass: afterwards the layer is as it was before."""


_OWNERS: WeakValueDictionary[int, WeightOwner] = WeakValueDictionary()
_numbers = itertools.count(1)


def register_owner(owner: WeightOwner) -> int:
    """Give ``owner`` the number by which the op finds it; it is forgotten with its last reference."""
    number = next(_numbers)
    _OWNERS[number] = owner
    return number


def _owner(number: int) -> WeightOwner:
    owner = _OWNERS.get(number)
    if owner is None:
        raise SpftError("the layer of this sparse delta was deleted before its backward pass: keep the model alive")
    return owner


_DELTA = (
    "Tensor values, Tensor positions, Tensor originals, Tensor rows, Tensor columns, Tensor slots, "
    "int[] row_stops, int[] value_stops"
)
_library = torch.library.Library("spft", "DEF")
_library.define(
    f"linear(Tensor x, Tensor? bias, {_DELTA}, bool save_columns, int out_features, int owner) -> (Tensor, Tensor)"
)
_library.define(
    f"linear_backward(Tensor grad_y, Tensor x, {_DELTA}, bool x_is_columns, int in_features, int owner, "
    "bool need_x, bool need_values) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x, bias, values, positions, originals, rows, columns, slots, row_stops, value_stops, save_columns,
            out_features, owner):  # fmt: skip
    weight = _owner(owner).effective_weight(values, positions, originals)
    y = F.linear(x, weight.to(x.dtype), bias)
    return y, select_columns(x, columns) if save_columns else x.new_empty(0)


@torch.library.register_fake("spft::linear", lib=_library)
def _linear_fake(x, bias, values, positions, originals, rows, columns, slots, row_stops, value_stops, save_columns,
                 out_features, owner):  # fmt: skip
    y = x.new_empty(*x.shape[:-1], out_features)
    return y, x.new_empty(x.numel() // x.shape[-1], columns.numel()) if save_columns else x.new_empty(0)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad_y, x, values, positions, originals, rows, columns, slots, row_stops, value_stops,
                     x_is_columns, in_features, owner, need_x, need_values):  # fmt: skip
    # once: attention hands over a transposed view, which both products would copy
    grad_y = grad_y.contiguous()
    grad_x = grad_values = grad_y.new_empty(0)
    if need_x:
        with _owner(owner).effective_weight_again(values, positions, originals) as weight:
            grad_x = grad_y.matmul(weight.to(grad_y.dtype))
    if need_values:
        if not x_is_columns:
            x = select_columns(x, columns) if columns.numel() < in_features else x.reshape(-1, in_features)
        grad_values = values_grad(grad_y, x, rows, slots, row_stops, value_stops).to(values.dtype)
    return grad_x, grad_values


@torch.library.register_fake("spft::linear_backward", lib=_library)
def _linear_backward_fake(grad_y, x, values, positions, originals, rows, columns, slots, row_stops, value_stops,
                          x_is_columns, in_features, owner, need_x, need_values):  # fmt: skip
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features) if need_x else grad_y.new_empty(0)
    return grad_x, torch.empty_like(values) if need_values else grad_y.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    x, _, values, *delta, row_stops, value_stops, save_columns, _, owner = inputs
    kept = (output[1] if save_columns else x) if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, values, *delta)
    ctx.plan = (row_stops, value_stops, save_columns, x.shape[-1], owner)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y: Tensor | None, linear_backward) -> tuple:
    """The gradients of x, bias and values, and None for every other argument of ``spft::linear``."""
    others = (None,) * 10
    if grad_y is None:
        return (None, None, None, *others)
    kept, *delta = ctx.saved_tensors
    need_x, need_bias, need_values = ctx.needs_input_grad[:3]
    grad_x, grad_values = linear_backward(
        grad_y, grad_y if kept is None else kept, *delta, *ctx.plan, need_x, need_values
    )
    grad_bias = grad_y.sum(dim=tuple(range(grad_y.ndim - 1))) if need_bias else None
    return (grad_x if need_x else None, grad_bias, grad_values if need_values else None, *others)


torch.library.register_autograd(
    "spft::linear",
    lambda ctx, grad_y, _: _gradients(ctx, grad_y, torch.ops.spft.linear_backward),
    setup_context=_setup_context,
    lib=_library,
)


class _EagerLinear(torch.autograd.Function):
    """``spft::linear`` without the dispatcher, whose wrappers cost as much as a small product."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _linear(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        return _gradients(ctx, grad_y, _linear_backward)


def sparse_linear(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    positions: Tensor,
    originals: Tensor,
    plan: Plan,
    out_features: int,
    owner: int,
) -> Tensor:
    """y = x (W + S)^T + b.

    Args:
        x: (..., in_features).
        bias: (out_features) in the dtype of ``x``, or None.
        values: (nnz); receives a gradient.
        positions: (nnz) where they stand in the owner's flattened weight.
        originals: (nnz) what W holds there without S, or empty when the owner makes W afresh.
        plan: the `Plan` of the mask.
        owner: number of the `WeightOwner`, from `register_owner`.

    Returns:
        (..., out_features) in the dtype of ``x``.
    """
    *plan, save_columns = plan
    save_columns = save_columns and torch.is_grad_enabled() and values.requires_grad
    inputs = (x, bias, values, positions, originals, *plan, save_columns, out_features, owner)
    return torch.ops.spft.linear(*inputs)[0] if torch.compiler.is_compiling() else _EagerLinear.apply(*inputs)
