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
from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.values_grad import values_grad


class WeightOwner(Protocol):
    """What the op needs of a layer."""

    def effective_weight(
        self, values: Tensor, mask: Mask, originals: Tensor, keep: bool
    ) -> AbstractContextManager[Tensor]:
        """W + S as (out_features, in_features); ``keep`` allows it to stay in place afterwards."""


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


_MASK_AND_PLAN = (
    "Tensor values, Tensor columns, Tensor row_offsets, Tensor originals, Tensor used_rows, Tensor used_columns, "
    "int[] row_stops, int[] value_stops"
)


@torch.library.custom_op(
    "spft::linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_MASK_AND_PLAN}, bool save_columns, int in_features, int owner)"
    " -> (Tensor, Tensor)",
)
def _linear(x, bias, values, columns, row_offsets, originals, used_rows, used_columns, row_stops, value_stops,
            save_columns, in_features, owner):  # fmt: skip
    with _owner(owner).effective_weight(values, Mask(columns, row_offsets), originals, keep=True) as weight:
        y = F.linear(x, weight.to(x.dtype), bias)
    return y, x.index_select(-1, used_columns) if save_columns else x.new_empty(0)


@_linear.register_fake
def _(x, bias, values, columns, row_offsets, originals, used_rows, used_columns, row_stops, value_stops,
      save_columns, in_features, owner):  # fmt: skip
    y = x.new_empty(*x.shape[:-1], row_offsets.numel() - 1)
    return y, x.new_empty(*x.shape[:-1], used_columns.numel()) if save_columns else x.new_empty(0)


@torch.library.custom_op(
    "spft::linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor x, {_MASK_AND_PLAN}, bool x_is_columns, int in_features, int owner, "
    "bool need_x, bool need_values) -> (Tensor, Tensor)",
)
def _linear_backward(grad_y, x, values, columns, row_offsets, originals, used_rows, used_columns, row_stops,
                     value_stops, x_is_columns, in_features, owner, need_x, need_values):  # fmt: skip
    mask = Mask(columns, row_offsets)
    grad_x = grad_values = grad_y.new_empty(0)
    if need_x:
        with _owner(owner).effective_weight(values, mask, originals, keep=False) as weight:
            grad_x = grad_y.matmul(weight.to(grad_y.dtype))
    if need_values:
        x = x.reshape(-1, x.shape[-1])
        if not x_is_columns and used_columns.numel() < in_features:
            x = x.index_select(1, used_columns)
        grad_values = values_grad(
            grad_y.reshape(-1, grad_y.shape[-1]), x, mask, used_rows, used_columns, row_stops, value_stops, in_features
        ).to(values.dtype)
    return grad_x, grad_values


@_linear_backward.register_fake
def _(grad_y, x, values, columns, row_offsets, originals, used_rows, used_columns, row_stops, value_stops,
      x_is_columns, in_features, owner, need_x, need_values):  # fmt: skip
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features) if need_x else grad_y.new_empty(0)
    return grad_x, torch.empty_like(values) if need_values else grad_y.new_empty(0)


def _setup_context(ctx, inputs, output):
    (x, _, values, columns, row_offsets, originals, used_rows, used_columns, row_stops, value_stops,
     save_columns, in_features, owner) = inputs  # fmt: skip
    kept = (output[1] if save_columns else x) if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, values, columns, row_offsets, originals, used_rows, used_columns)
    ctx.plan = (row_stops, value_stops, save_columns, in_features, owner)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, _):
    nothing = (None,) * 10
    if grad_y is None:
        return (None, None, None, *nothing)
    kept, values, *mask_and_plan = ctx.saved_tensors
    row_stops, value_stops, x_is_columns, in_features, owner = ctx.plan
    need_x, need_bias, need_values = ctx.needs_input_grad[:3]
    grad_x, grad_values = torch.ops.spft.linear_backward(
        grad_y, grad_y if kept is None else kept, values, *mask_and_plan, row_stops, value_stops,
        x_is_columns, in_features, owner, need_x, need_values,
    )  # fmt: skip
    grad_bias = grad_y.sum(dim=tuple(range(grad_y.ndim - 1))) if need_bias else None
    return (grad_x if need_x else None, grad_bias, grad_values if need_values else None, *nothing)


_linear.register_autograd(_backward, setup_context=_setup_context)


def sparse_linear(x, bias, values, mask: Mask, originals, plan, in_features: int, owner: int) -> Tensor:
    """y = x (W + S)^T + b.

    Args:
        x: (..., in_features).
        bias: (out_features) in the dtype of ``x``, or None.
        values: (nnz); receives a gradient.
        mask: where the values stand.
        originals: (nnz) what W holds there without S, or empty when the owner makes W afresh.
        plan: the `Plan` of ``mask``.
        owner: number of the `WeightOwner`, from `register_owner`.

    Returns:
        (..., out_features) in the dtype of ``x``.
    """
    save_columns = plan.save_columns and torch.is_grad_enabled() and values.requires_grad
    return torch.ops.spft.linear(
        x, bias, values, mask.columns, mask.row_offsets, originals, plan.rows, plan.columns,
        plan.row_stops, plan.value_stops, save_columns, in_features, owner,
    )[0]  # fmt: skip
