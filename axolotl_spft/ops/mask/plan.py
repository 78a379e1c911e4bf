"""What the forward and backward pass need to know about a mask, worked out once.

All of it is as long as a row or a column of the weight; what is as long as the values is worked out from the mask while
it is needed (`block_slots`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.ops.mask.csr import Mask, row_indices, used_columns, used_rows

# the dense block of the weight gradient that is alive at a time: 2**24 entries are 32 MiB in bf16
BLOCK_ENTRIES = 2**24
# above this share of used columns their copy is hardly smaller than x
KEEP_COLUMNS_UP_TO = 0.9
# above this share of used rows copying them takes longer than multiplying all
COPY_ROWS_UP_TO = 0.75
# widths at which rows of 16-bit numbers start at 32-byte boundaries: without, matrix products are slow on GPUs and
# take up to 1.4 times the time on a CPU with AMX
MULTIPLE = 16


class Plan(NamedTuple):
    """Rows and columns that hold an entry, cut into blocks of rows.

    Attributes:
        rows: used rows, int32, ascending, the last one again to fill up; None: all.
        columns: the columns of x that backward is given, int32, ascending, the last one again to fill up; None: x
            itself. Those that the mask uses are among them.
        offsets: (rows + 1; int32) where the values of each of these rows begin; those that fill up have none.
        column_ranks: (in_features; int32) where a used column stands in ``columns``; None where these are all.
        row_stops: for each block, the index into ``rows`` where it ends.
        value_stops: for each block, the index into the values where it ends.
        in_features: of the weight.
    """

    rows: Tensor | None
    columns: Tensor | None
    offsets: Tensor
    column_ranks: Tensor | None
    row_stops: list[int]
    value_stops: list[int]
    in_features: int

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """For each block its part of the rows, and its part of the values."""
        row_start = value_start = 0
        for row_stop, value_stop in zip(self.row_stops, self.value_stops):
            yield slice(row_start, row_stop), slice(value_start, value_stop)
            row_start, value_start = row_stop, value_stop

    @property
    def n_columns(self) -> int:
        return self.in_features if self.columns is None else self.columns.numel()

    @property
    def n_rows(self) -> int:
        return self.row_stops[-1]


def make_plan(
    mask: Mask,
    in_features: int,
    block_entries: int = BLOCK_ENTRIES,
    multiple: int = MULTIPLE,
    columns: Tensor | None = None,
) -> Plan:
    """The plan of ``mask`` (nnz >= 1) for a weight with ``in_features`` columns.

    The numbers of rows and columns are multiples of ``multiple``, or all are taken, as also where most are used.

    Args:
        columns: that this and other layers keep one copy of (ascending, all that the mask uses among them); by default
            those that the mask uses.
    """
    used = used_rows(mask)
    rows = padded(used, multiple)
    if rows.numel() > COPY_ROWS_UP_TO * mask.out_features:
        # a copy: what is kept for a plan is found by this tensor
        rows, offsets = None, mask.row_offsets.clone()
    else:
        ends = mask.row_offsets[-1:].expand(rows.numel() - used.numel() + 1)
        offsets = torch.cat([mask.row_offsets[used], ends])
    columns = padded(used_columns(mask, in_features) if columns is None else columns, multiple).to(torch.int32)
    column_ranks = None
    if columns.numel() > KEEP_COLUMNS_UP_TO * in_features:
        columns = None
    else:
        every = torch.arange(in_features, dtype=torch.int32, device=columns.device)
        column_ranks = torch.searchsorted(columns, every, out_int32=True)
    n_rows = mask.out_features if rows is None else rows.numel()
    n_columns = in_features if columns is None else columns.numel()
    rows_per_block = max(1, block_entries // n_columns)
    rows_per_block = max(multiple, rows_per_block // multiple * multiple)
    row_stops = [*range(rows_per_block, n_rows, rows_per_block), n_rows]
    value_stops = [mask.nnz]
    if len(row_stops) > 1:
        value_stops = offsets[row_stops].tolist()
    return Plan(
        None if rows is None else rows.to(torch.int32),
        columns,
        offsets,
        column_ranks,
        row_stops,
        value_stops,
        in_features,
    )


def column_ranks(plan: Plan, columns: Tensor) -> Tensor:
    """Where ``columns`` of the mask stand among the plan's: int32."""
    columns = columns.to(torch.int32)
    return columns if plan.column_ranks is None else plan.column_ranks.index_select(0, columns)


def block_slots(plan: Plan, mask: Mask, rows: slice, values: slice) -> Tensor:
    """Where the entries of one of the plan's `Plan.blocks` stand in its flattened product: (its values; int32)."""
    ranks = row_indices(plan.offsets[rows.start : rows.stop + 1], values.stop - values.start)
    return column_ranks(plan, mask.columns[values]).add(ranks, alpha=plan.n_columns)


def padded(indices: Tensor, multiple: int) -> Tensor:
    """``indices`` with the last one repeated until their number is a multiple of ``multiple``."""
    missing = -indices.numel() % multiple
    return torch.cat([indices, indices[-1:].expand(missing)]) if missing else indices
