"""What the forward and backward pass need to know about a mask, worked out once.

All of it is as long as a row or a column of the weight; what is as long as the values is worked out from the mask while
it is needed (`block_slots`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.ops.csr import Mask, spread, used_columns, used_rows

# the dense block of the weight gradient that is alive at a time: 2**24 entries are 32 MiB in bf16
BLOCK_ENTRIES = 2**24
# above this share of used columns their copy is hardly smaller than x
KEEP_COLUMNS_UP_TO = 0.9
# widths at which rows of 16-bit numbers start at 32-byte boundaries: matrix products on GPUs are slow without
GPU_MULTIPLE = 16


class Plan(NamedTuple):
    """Rows and columns that hold an entry, cut into blocks of rows.

    Attributes:
        rows: used rows, int32, ascending, some again at the end; None: all.
        columns: used columns, int32, those with the most entries first, so that `axolotl_spft.ops.tiles` finds the
            columns of x in its own order, some again at the end; None: all, ascending.
        row_starts: (out_features; int32) where a used row begins in its flattened block of rows x columns.
        column_ranks: (in_features; int32) where a used column stands in ``columns``; None where these are all.
        kept: columns of x that backward is given, int32; None: x itself.
        places: where ``columns`` stand in what backward is given, int32; None: in the same order.
        row_stops: for each block, the index into ``rows`` where it ends.
        value_stops: for each block, the index into the values where it ends.
        in_features: of the weight.
    """

    rows: Tensor | None
    columns: Tensor | None
    row_starts: Tensor
    column_ranks: Tensor | None
    kept: Tensor | None
    places: Tensor | None
    row_stops: list[int]
    value_stops: list[int]
    in_features: int

    @property
    def n_columns(self) -> int:
        return self.in_features if self.columns is None else self.columns.numel()

    @property
    def n_rows(self) -> int:
        return self.row_stops[-1]

    def area(self) -> float:
        """Share of the weight's entries that lie on a used row and a used column."""
        return self.n_rows * self.n_columns / (self.row_starts.numel() * self.in_features)


def make_plan(
    mask: Mask,
    in_features: int,
    block_entries: int = BLOCK_ENTRIES,
    multiple: int | None = None,
    shared_columns: Tensor | None = None,
) -> Plan:
    """The plan of ``mask`` (nnz >= 1) for a weight with ``in_features`` columns.

    The numbers of rows and columns are multiples of ``multiple`` (by default `GPU_MULTIPLE` on a GPU, else 1), or all
    are taken.

    Args:
        shared_columns: columns of x that this and other layers keep one copy of (int32, ascending, all used ones among
            them).
    """
    if multiple is None:
        multiple = GPU_MULTIPLE if mask.columns.is_cuda else 1
    rows, columns = used_rows(mask), used_columns(mask, in_features)
    row_ranks = torch.zeros(mask.out_features, dtype=torch.int64, device=rows.device)
    row_ranks[rows] = torch.arange(rows.numel(), device=rows.device)
    if _rounded_up(rows.numel(), multiple) < mask.out_features:
        rows = padded(rows, multiple)
    else:
        rows, row_ranks = None, torch.arange(mask.out_features, device=rows.device)
    column_ranks = None
    if _rounded_up(columns.numel(), multiple) < in_features:
        counts = torch.bincount(mask.columns.to(torch.int64), minlength=in_features)
        columns = columns[counts[columns].argsort(descending=True, stable=True)]
        column_ranks = torch.zeros(in_features, dtype=torch.int32, device=columns.device)
        column_ranks[columns] = torch.arange(columns.numel(), dtype=torch.int32, device=columns.device)
        columns = padded(columns, multiple).to(torch.int32)
    else:
        # in their own order all columns are x itself, without a copy
        columns = None
    n_rows = mask.out_features if rows is None else rows.numel()
    n_columns = in_features if columns is None else columns.numel()
    rows_per_block = max(1, block_entries // n_columns)
    rows_per_block = max(multiple, rows_per_block // multiple * multiple)
    row_stops = [*range(rows_per_block, n_rows, rows_per_block), n_rows]
    value_stops = [mask.nnz]
    if len(row_stops) > 1:
        ends = mask.row_offsets[1:]
        ends = (ends if rows is None else ends[rows]).tolist()
        value_stops = [*(ends[stop - 1] for stop in row_stops[:-1]), mask.nnz]
    return Plan(
        None if rows is None else rows.to(torch.int32),
        columns,
        (row_ranks % rows_per_block * n_columns).to(torch.int32),
        column_ranks,
        *_kept(columns, shared_columns, in_features),
        row_stops,
        value_stops,
        in_features,
    )


def _kept(columns: Tensor | None, shared: Tensor | None, in_features: int) -> tuple[Tensor | None, Tensor | None]:
    """`Plan.kept` and `Plan.places`."""
    kept = columns if shared is None else shared
    if columns is None or kept.numel() > KEEP_COLUMNS_UP_TO * in_features:
        return None, columns
    if shared is None:
        return columns, None
    return shared, torch.searchsorted(shared, columns, out_int32=True)


def column_ranks(plan: Plan, mask: Mask) -> Tensor:
    """Where the column of each entry stands in the plan's: (nnz; int32)."""
    columns = mask.columns.to(torch.int32)
    return columns if plan.column_ranks is None else plan.column_ranks.index_select(0, columns)


def block_slots(plan: Plan, mask: Mask) -> Tensor:
    """Where each entry stands in its flattened block of rows x columns: (nnz; int32)."""
    return spread(plan.row_starts, mask).add_(column_ranks(plan, mask))


def padded(indices: Tensor, multiple: int) -> Tensor:
    """``indices`` with the first repeated at the end until their number is a multiple of ``multiple``."""
    missing = _rounded_up(indices.numel(), multiple) - indices.numel()
    return torch.cat([indices, indices[:1].expand(missing)]) if missing else indices


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
