"""The linear layer with a sparse delta, as one custom op with its backward.

    y  = x (W + S)^T + b
    dX = dY (W + S)
    dV = (dY[:, rows]^T X[:, columns])[mask]

W is not an argument: the op asks the layer that owns it for W + S, so that a plain weight needs no copy, a quantized
one is dequantized only while it is multiplied, and nothing of it is kept for backward. What backward keeps is the
columns of x that the mask uses, which layers with one input may share, or nothing where a norm keeps what they can be
made from.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.backends.dispatch import use_c
from axolotl_spft.ops.backends.presence import check_present
from axolotl_spft.ops.backends.products import cast, linear, matmul
from axolotl_spft.ops.gradient.beside import Beside
from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.gradient.norm_output import NormOutput
from axolotl_spft.ops.gradient.values_grad import values_grad
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan


class Delta(NamedTuple):
    """Where the values of a sparse delta stand.

    Attributes:
        mask: the CSR mask.
        plan: the `Plan` of the mask.
        originals: (nnz) what a quantized weight has at these entries in place of its own; None where that stays.
    """

    mask: Mask
    plan: Plan
    originals: Tensor | None = None


class WeightOwner(Protocol):
    """What the op needs of a layer."""

    def effective_weight(self, values: Tensor, delta: Delta) -> AbstractContextManager[Tensor]:
        """W + S as (out_features, in_features), to be read within the block."""


_OWNERS: WeakValueDictionary[int, WeightOwner] = WeakValueDictionary()
_numbers = itertools.count(1)
_made = 0


def register_owner(owner: WeightOwner) -> int:
    """Give ``owner`` the number by which a compiled graph finds it; it is forgotten with its last reference."""
    global _made
    number = _made = next(_numbers)
    _OWNERS[number] = owner
    return number


def owners_made() -> int:
    """How many numbers `register_owner` has given: while it stays the same, there is no new layer."""
    return _made


def owner_of(number: int) -> WeightOwner:
    owner = _OWNERS.get(number)
    if owner is None:
        raise SpftError(
            "the layer of this sparse delta no longer exists: keep the model while its graphs run, and export a model "
            "merged by merge_and_unload(), since a graph asks the layers for their weights"
        )
    return owner


def _forward(x: Tensor, bias: Tensor | None, values: Tensor, delta: Delta, owner: WeightOwner) -> Tensor:
    check_present(x, values=values, columns=delta.mask.columns)
    with owner.effective_weight(values, delta) as weight:
        return linear(x, cast(weight, x.dtype), bias)


def _backward(
    grad_y: Tensor,
    kept: Tensor | NormOutput | None,
    values: Tensor,
    delta: Delta,
    owner: WeightOwner,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dX and dV."""
    # once: attention hands over a transposed view, which both products would copy
    grad_y = grad_y.contiguous()
    beside = Beside(grad_y.device) if grad_y.is_cuda and need_x and need_values else None
    grad_x = grad_values = None
    if need_values:
        with beside or nullcontext():
            if isinstance(kept, NormOutput):
                kept = kept.columns()
            elif kept.ndim != 2:
                kept = kept.reshape(-1, kept.shape[-1])
            grad_values = values_grad(grad_y, kept, delta.mask, delta.plan, values.dtype)
    if need_x:
        with owner.effective_weight(values, delta) as weight:
            grad_x = matmul(grad_y, cast(weight, grad_y.dtype))
    if beside is not None:
        beside.join()
    return grad_x, grad_values


def bias_gradient(grad_y: Tensor) -> Tensor:
    """(features) of dY (..., features)."""
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0)


def once_differentiable(backward: Callable) -> Callable:
    """torch's own, which sets the mode for gradients each time, only where a gradient of the gradient is asked for."""
    careful = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def chosen(ctx: Any, grad_y: Tensor) -> tuple:
        return careful(ctx, grad_y) if torch.is_grad_enabled() else backward(ctx, grad_y)

    return chosen


class _EagerLinear(torch.autograd.Function):
    """The layer without the dispatcher, whose wrappers cost as much as a small product."""

    @staticmethod
    def forward(ctx, x, kept, bias, values, delta, owner):
        ctx.delta, ctx.owner, ctx.normed = delta, owner, None
        if isinstance(kept, NormOutput):
            kept.readers += 1
            ctx.normed, kept = kept, None
        ctx.save_for_backward(kept, values)
        return _forward(x, bias, values, delta, owner)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        need_x, _, need_bias, need_values = ctx.needs_input_grad[:4]
        kept, values = ctx.saved_tensors
        grad_x, grad_values = _backward(grad_y, ctx.normed or kept, values, ctx.delta, ctx.owner, need_x, need_values)
        return grad_x, None, bias_gradient(grad_y) if need_bias else None, grad_values, None, None


# --- the same as custom ops, for torch.compile

_DELTA = (
    "Tensor values, Tensor mask_columns, Tensor row_offsets, Tensor? originals, Tensor? rows, Tensor? columns, "
    "Tensor offsets, Tensor? column_ranks, int[] row_stops, int[] value_stops, int in_features"
)
_TENSORS = 8
_library = torch.library.Library("spft", "DEF")
_library.define("select_columns(Tensor x, Tensor columns) -> Tensor")
_library.define(f"linear(Tensor x, Tensor? kept, Tensor? bias, {_DELTA}, int owner) -> Tensor")
_library.define(
    f"linear_backward(Tensor grad_y, Tensor? kept, {_DELTA}, int owner, bool need_x, bool need_values) "
    "-> (Tensor, Tensor)"
)


def _delta_of(arguments: Sequence) -> Delta:
    mask_columns, row_offsets, originals, *plan = arguments
    return Delta(Mask(mask_columns, row_offsets), Plan(*plan), originals)


_library.impl("select_columns", select_columns, "CompositeExplicitAutograd")
# no gradient flows through a copy
_library.impl("select_columns", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("spft::select_columns", lib=_library)
def _select_columns_fake(x, columns):
    x = x.reshape(-1, x.shape[-1])
    tokens, n_columns = x.shape[0], columns.numel()
    return x.new_empty(n_columns, tokens).t() if use_c("auto", x) else x.new_empty(tokens, n_columns)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x, kept, bias, values, *rest):
    *delta, owner = rest
    return _forward(x, bias, values, _delta_of(delta), owner_of(owner))


@torch.library.register_fake("spft::linear", lib=_library)
def _linear_fake(x, kept, bias, values, *rest):
    out_features = _delta_of(rest[:-1]).mask.out_features
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad_y, kept, values, *rest):
    *delta, owner, need_x, need_values = rest
    gradients = _backward(grad_y, kept, values, _delta_of(delta), owner_of(owner), need_x, need_values)
    return tuple(grad_y.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("spft::linear_backward", lib=_library)
def _linear_backward_fake(grad_y, kept, values, *rest):
    *delta, _, need_x, need_values = rest
    in_features = _delta_of(delta).plan.in_features
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features) if need_x else grad_y.new_empty(0)
    return grad_x, torch.empty_like(values) if need_values else grad_y.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    _, kept, _, *tensors = inputs[: 3 + _TENSORS]
    ctx.save_for_backward(kept, *tensors)
    ctx.rest = inputs[3 + _TENSORS :]
    ctx.set_materialize_grads(False)


def _op_gradients(ctx, grad_y: Tensor | None) -> tuple:
    others = (None,) * (_TENSORS - 1 + len(ctx.rest))
    if grad_y is None:
        return (None, None, None, None, *others)
    need_x, _, need_bias, need_values = ctx.needs_input_grad[:4]
    grad_x, grad_values = torch.ops.spft.linear_backward(grad_y, *ctx.saved_tensors, *ctx.rest, need_x, need_values)
    return (
        grad_x if need_x else None,
        None,
        bias_gradient(grad_y) if need_bias else None,
        grad_values if need_values else None,
        *others,
    )


torch.library.register_autograd("spft::linear", _op_gradients, setup_context=_setup_context, lib=_library)


def kept_columns(x: Tensor, plan: Plan) -> Tensor:
    """What `sparse_linear` needs to form the values' gradient: X[:, plan.columns], (tokens, columns)."""
    if x.shape[-1] != plan.in_features:
        # on a GPU, reading columns that do not exist would end the whole process
        raise RuntimeError(f"the input has {x.shape[-1]} features (shape {tuple(x.shape)}), not {plan.in_features}")
    if plan.columns is None:
        return x.detach()
    select = torch.ops.spft.select_columns if torch.compiler.is_compiling() else select_columns
    return select(x, plan.columns)


def sparse_linear(
    x: Tensor,
    kept: Tensor | NormOutput | None,
    bias: Tensor | None,
    values: Tensor,
    delta: Delta,
    owner: WeightOwner,
    number: int,
) -> Tensor:
    """y = x (W + S)^T + b.

    Args:
        x: (..., in_features).
        kept: from `kept_columns` or `norm_output`, for the same x; None where the values need no gradient.
        bias: (out_features) in the dtype of ``x``, or None.
        values: (nnz); receives a gradient.
        delta: where the values stand.
        owner: gives W + S.
        number: of the owner, from `register_owner`.

    Returns:
        (..., out_features) in the dtype of ``x``.
    """
    if not torch.compiler.is_compiling():
        return _EagerLinear.apply(x, kept, bias, values, delta, owner)
    return torch.ops.spft.linear(x, kept, bias, values, *delta.mask, delta.originals, *delta.plan, number)
