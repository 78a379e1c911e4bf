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


class Plan(NamedTuple):
    """Rows and columns that hold an entry, cut into blocks of rows.

    Attributes:
        rows: used rows, int64, ascending.
        columns: used columns, int64: ascending where all are used, else those with the most entries first, so that
            `axolotl_spft.ops.tiles` finds the columns of x in its own order.
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


def make_plan(mask: Mask, in_features: int, block_entries: int = BLOCK_ENTRIES) -> Plan:
    """The plan of ``mask`` (nnz >= 1) for a weight with ``in_features`` columns."""
    rows, columns = used_rows(mask), used_columns(mask, in_features)
    rows_per_block = max(1, block_entries // columns.numel())
    row_ranks = torch.searchsorted(rows, row_indices(mask))
    column_ranks = torch.searchsorted(columns, mask.columns.to(torch.int64))
    # all columns in their own order are x itself, without a copy
    if columns.numel() < in_features:
        order, column_ranks = by_count(column_ranks, columns.numel())
        columns = columns[order]
    slots = (row_ranks % rows_per_block) * columns.numel() + column_ranks
    row_stops = [*range(rows_per_block, rows.numel(), rows_per_block), rows.numel()]
    value_stops = [mask.nnz]
    if len(row_stops) > 1:
        ends = mask.row_offsets[1:][rows].tolist()
        value_stops = [ends[stop - 1] for stop in row_stops]
    save_columns = columns.numel() <= SAVE_COLUMNS_UP_TO * in_features
    return Plan(rows, columns, slots.to(torch.int32), row_stops, value_stops, save_columns)


def by_count(ranks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The order of 0..size-1 that puts what occurs most often in ``ranks`` first, and each rank's place in it."""
    order = torch.bincount(ranks, minlength=size).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(size, device=order.device)
    return order, places[ranks]
