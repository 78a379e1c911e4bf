"""The embedding layer with a sparse delta, as one custom op with its backward.

    y  = (W + S)[ids]
    dV = (sum over the tokens of dY, by their rows)[mask]

Of W, of S and of their gradients no rows are read or made but those of the tokens that are looked up. W is not an
argument: the op asks the layer that owns it, as in `axolotl_spft.ops.linear`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spft.ops.backends.presence import check_present
from axolotl_spft.ops.linear import Delta, once_differentiable, owner_of
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.weight.scatter import rounded_sum


class Lookup(NamedTuple):
    """How an embedding looks tokens up, as `torch.nn.Embedding` has it.

    Attributes:
        padding_idx: the token whose row gets no gradient, if any.
        scale_grad_by_freq: whether a token's gradient is divided by how often it is looked up in a batch.
    """

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False


class RowOwner(Protocol):
    """What the op needs of a layer."""

    def rows_of_sum(self, ids: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(W + S)[ids]: (..., embedding_dim), new memory."""


def embed(ids: Tensor, weight: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """(W + S)[ids], each entry rounded once, with the bits that W + S has in place.

    Args:
        ids: (...) of tokens.
        weight: W (tokens, embedding_dim).
        values: (nnz).

    Returns:
        (..., embedding_dim) in the dtype of ``weight``.
    """
    check_present(ids, weight=weight, values=values, columns=mask.columns)
    tokens, inverse = ids.unique(return_inverse=True)
    rows = F.embedding(tokens, weight)
    entries, places = entries_of_rows(mask, tokens, rows.shape[1])
    flat = rows.view(-1)
    flat[places] = rounded_sum(flat[places], values[entries])
    return F.embedding(inverse, rows)


def entries_of_rows(mask: Mask, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mask's entries in the rows ``tokens``, and where each stands in (len(tokens), width), flattened: int64."""
    starts = mask.row_offsets[tokens].to(torch.int64)
    counts = mask.row_offsets[tokens + 1].to(torch.int64) - starts
    ends = counts.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    rows = torch.repeat_interleave(counts, output_size=total)
    entries = torch.arange(total, device=tokens.device) + (starts - ends + counts)[rows]
    return entries, mask.columns[entries].to(torch.int64).add(rows, alpha=width)


def row_gradients(grad_y: Tensor, ids: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """The rows of dW that are not 0, as a gradient of `torch.nn.Embedding` has them.

    Args:
        grad_y: dY (..., embedding_dim).
        ids: (...) of tokens.

    Returns:
        The tokens (int64, ascending), and their rows (tokens, embedding_dim): float32, or float64 of such a dY.
    """
    ids, grad_rows = ids.reshape(-1), grad_y.reshape(-1, grad_y.shape[-1])
    if lookup.padding_idx is not None:
        counted = (ids != lookup.padding_idx).nonzero().squeeze(1)
        ids, grad_rows = ids[counted], grad_rows[counted]
    tokens, inverse = ids.unique(return_inverse=True)
    grad_rows = grad_rows.to(torch.promote_types(grad_rows.dtype, torch.float32))
    # torch's own, whose sums do not vary from run to run; of the rows that there are it gets the numbers
    sums = torch.ops.aten.embedding_dense_backward(grad_rows, inverse, len(tokens), -1, lookup.scale_grad_by_freq)
    return tokens, sums


def embedding_values_grad(grad_y: Tensor, ids: Tensor, mask: Mask, lookup: Lookup, dtype: torch.dtype) -> Tensor:
    """dV: (nnz) in ``dtype``; see `row_gradients` for the other arguments."""
    ids = ids.reshape(-1)
    held = (mask.row_offsets[ids + 1] > mask.row_offsets[ids]).nonzero().squeeze(1)
    tokens, sums = row_gradients(grad_y.reshape(-1, grad_y.shape[-1])[held], ids[held], lookup)
    grads = torch.zeros(mask.nnz, dtype=dtype, device=grad_y.device)
    entries, places = entries_of_rows(mask, tokens, grad_y.shape[-1])
    grads[entries] = sums.view(-1)[places].to(dtype)
    return grads


class _EagerEmbedding(torch.autograd.Function):
    """The layer without the dispatcher."""

    @staticmethod
    def forward(ctx, ids, values, mask, lookup, owner):
        ctx.save_for_backward(ids, *mask)
        ctx.lookup, ctx.dtype = lookup, values.dtype
        return owner.rows_of_sum(ids, values, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        ids, *mask = ctx.saved_tensors
        return None, embedding_values_grad(grad_y, ids, Mask(*mask), ctx.lookup, ctx.dtype), None, None, None


# --- the same as custom ops, for torch.compile

_library = torch.library.Library("spft", "FRAGMENT")
_TENSORS = "Tensor ids, Tensor values, Tensor columns, Tensor row_offsets"
_LOOKUP = "int? padding_idx, bool scale_grad_by_freq"
_library.define(f"embedding({_TENSORS}, {_LOOKUP}, int width, ScalarType dtype, int owner) -> Tensor")
_library.define(f"embedding_backward(Tensor grad_y, {_TENSORS}, {_LOOKUP}) -> Tensor")


@torch.library.impl(_library, "embedding", "CompositeExplicitAutograd")
def _embedding(ids, values, columns, row_offsets, padding_idx, scale_grad_by_freq, width, dtype, owner):
    return owner_of(owner).rows_of_sum(ids, values, Mask(columns, row_offsets))


@torch.library.register_fake("spft::embedding", lib=_library)
def _embedding_fake(ids, values, columns, row_offsets, padding_idx, scale_grad_by_freq, width, dtype, owner):
    return values.new_empty(*ids.shape, width, dtype=dtype)


@torch.library.impl(_library, "embedding_backward", "CompositeExplicitAutograd")
def _embedding_backward(grad_y, ids, values, columns, row_offsets, padding_idx, scale_grad_by_freq):
    lookup = Lookup(padding_idx, scale_grad_by_freq)
    return embedding_values_grad(grad_y, ids, Mask(columns, row_offsets), lookup, values.dtype)


@torch.library.register_fake("spft::embedding_backward", lib=_library)
def _embedding_backward_fake(grad_y, ids, values, columns, row_offsets, padding_idx, scale_grad_by_freq):
    return torch.empty_like(values)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.lookup = inputs[4:6]


def _op_gradients(ctx, grad_y: Tensor) -> tuple:
    return None, torch.ops.spft.embedding_backward(grad_y, *ctx.saved_tensors, *ctx.lookup), *(None,) * 7


torch.library.register_autograd("spft::embedding", _op_gradients, setup_context=_setup_context, lib=_library)


def sparse_embedding(
    ids: Tensor, values: Tensor, delta: Delta, lookup: Lookup, dtype: torch.dtype, owner: RowOwner, number: int
) -> Tensor:
    """y = (W + S)[ids].

    Args:
        ids: (...) of tokens.
        values: (nnz); receives a gradient.
        delta: where the values stand.
        dtype: of W, and of y.
        owner: gives (W + S)[ids].
        number: of the owner, from `axolotl_spft.ops.linear.register_owner`.

    Returns:
        (..., embedding_dim).
    """
    if not torch.compiler.is_compiling():
        return _EagerEmbedding.apply(ids, values, delta.mask, lookup, owner)
    width = delta.plan.in_features
    return torch.ops.spft.embedding(ids, values, *delta.mask, *lookup, width, dtype, number)
