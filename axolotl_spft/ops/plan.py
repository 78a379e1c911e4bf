"""What the forward and backward pass need to know about a mask, worked out once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.ops.csr import Mask, row_indices, used_columns, used_rows

# the dense block of the weight gradient that is alive at a time: 2**24 entries are 32 MiB in bf16
BLOCK_ENTRIES = 2**24
# above this share of used columns the slice of x costs about as much as x, which neighbours often keep anyway
SAVE_COLUMNS_UP_TO = 0.5
# widths at which rows of 16-bit numbers start at 32-byte boundaries: matrix products on GPUs are slow without
GPU_MULTIPLE = 16


class Plan(NamedTuple):
    """Rows and columns that hold an entry, cut into blocks of rows.

    Attributes:
        rows: used rows, int64, ascending; or all.
        columns: used columns, int64, those with the most entries first, so that `axolotl_spft.ops.tiles` finds the
            columns of x in its own order; or all, ascending. Some may stand again at the end, of rows too.
        slots: (nnz; int32) where each entry stands in its flattened block of rows x columns.
        row_stops: for each block, the index into ``rows`` where it ends.
        value_stops: for each block, the index into the values where it ends.
        save_columns: whether backward keeps the columns of x rather than x.
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor
    row_stops: list[int]
    value_stops: list[int]
    save_columns: bool

    def area(self, out_features: int, in_features: int) -> float:
        """Share of the weight's entries that lie on a used row and a used column."""
        return self.rows.numel() * self.columns.numel() / (out_features * in_features)


def make_plan(mask: Mask, in_features: int, block_entries: int = BLOCK_ENTRIES, multiple: int | None = None) -> Plan:
    """The plan of ``mask`` (nnz >= 1) for a weight with ``in_features`` columns.

    The numbers of rows and columns are multiples of ``multiple`` (by default `GPU_MULTIPLE` on a GPU, else 1), or all
    are taken.
    """
    if multiple is None:
        multiple = GPU_MULTIPLE if mask.columns.is_cuda else 1
    row_ranks, column_ranks = row_indices(mask), mask.columns.to(torch.int64)
    rows, columns = used_rows(mask), used_columns(mask, in_features)
    if _rounded_up(rows.numel(), multiple) < mask.out_features:
        row_ranks = torch.searchsorted(rows, row_ranks)
        rows = padded(rows, multiple)
    else:
        rows = torch.arange(mask.out_features, device=rows.device)
    if _rounded_up(columns.numel(), multiple) < in_features:
        order, column_ranks = by_count(torch.searchsorted(columns, column_ranks), columns.numel())
        columns = padded(columns[order], multiple)
    else:
        # in their own order all columns are x itself, without a copy
        columns = torch.arange(in_features, device=columns.device)
    rows_per_block = max(1, block_entries // columns.numel())
    rows_per_block = max(multiple, rows_per_block // multiple * multiple)
    slots = (row_ranks % rows_per_block) * columns.numel() + column_ranks
    row_stops = [*range(rows_per_block, rows.numel(), rows_per_block), rows.numel()]
    value_stops = [mask.nnz]
    if len(row_stops) > 1:
        ends = mask.row_offsets[1:][rows].tolist()
        value_stops = [*(ends[stop - 1] for stop in row_stops[:-1]), mask.nnz]
    save_columns = columns.numel() <= SAVE_COLUMNS_UP_TO * in_features
    return Plan(rows, columns, slots.to(torch.int32), row_stops, value_stops, save_columns)


def padded(indices: Tensor, multiple: int) -> Tensor:
    """``indices`` with the first repeated at the end until their number is a multiple of ``multiple``."""
    missing = _rounded_up(indices.numel(), multiple) - indices.numel()
    return torch.cat([indices, indices[:1].expand(missing)]) if missing else indices


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def by_count(ranks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The order of 0..size-1 that puts what occurs most often in ``ranks`` first, and each rank's place in it."""
    order = torch.bincount(ranks, minlength=size).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(size, device=order.device)
    return order, places[ranks]
