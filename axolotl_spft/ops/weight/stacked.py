"""Weights as matrices (out_features, in_features), whichever way they are stored.

The weights of several experts that are one parameter of three dimensions are one matrix too: expert under expert,
(experts x out_features of one, in_features). They are stored as (experts, out_features, in_features), or where each
expert's is transposed as (experts, in_features, out_features).
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.mask.csr import Mask, row_indices


def as_matrix(weight: Tensor, transposed: bool = False) -> Tensor:
    """A stored weight of two or three dimensions as (out_features, in_features): a view, but of transposed experts."""
    if weight.ndim == 3:
        return by_expert(weight, transposed).flatten(0, 1)
    return weight.t() if transposed else weight


def as_stored(matrix: Tensor, shape: torch.Size | tuple[int, ...], transposed: bool = False) -> Tensor:
    """The inverse of `as_matrix`, contiguous: a matrix in the ``shape`` of storage."""
    if len(shape) == 2:
        return matrix.t().contiguous() if transposed else matrix
    if transposed:
        return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
    return matrix.view(shape)


def by_expert(weight: Tensor, transposed: bool = False) -> Tensor:
    """Stored experts as (experts, out_features, in_features) of each: a view."""
    return weight.transpose(1, 2) if transposed else weight


def shape_of(weight: Tensor, transposed: bool = False) -> tuple[int, int]:
    """(out_features, in_features) of a stored weight of two or three dimensions."""
    *experts, rows, columns = weight.shape
    rows, columns = (columns, rows) if transposed else (rows, columns)
    return (experts[0] if experts else 1) * rows, columns


def memory_positions(mask: Mask, experts: Tensor) -> Tensor:
    """How far from the first number of ``experts`` each entry of the mask stands in memory: (nnz) int64.

    Args:
        mask: of (experts x out_features, in_features).
        experts: (experts, out_features, in_features) of any strides.
    """
    expert_stride, row_stride, column_stride = experts.stride()
    out_features = experts.shape[1]
    rows = row_indices(mask.row_offsets, mask.nnz)
    at = mask.columns.to(torch.int64).mul_(column_stride).add_(rows, alpha=row_stride)
    gap = expert_stride - out_features * row_stride
    return at.add_(rows.div(out_features, rounding_mode="floor"), alpha=gap) if gap else at


def entries_of(mask: Mask, experts: Tensor) -> Tensor:
    """What stands at the entries of the mask, without a copy of the rest: (nnz); arguments as `memory_positions`."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(experts.shape, experts.stride()))
    return experts.as_strided((extent,), (1,)).index_select(0, memory_positions(mask, experts))
