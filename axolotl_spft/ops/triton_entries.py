"""Triton kernel of `axolotl_spft.ops.entries`: finds the place of each entry and reads it in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.dispatch import launching_on
from axolotl_spft.ops.plan import Plan

_BLOCK = 512


@triton.jit
def entries_kernel(
    block,
    columns,
    row_offsets,
    rows,
    column_ranks,
    entries,
    row_start,
    n_columns,
    SOME_ROWS: tl.constexpr,
    SOME_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """entries = block[i, column_ranks[columns]] for row i of the block, which stands for rows[row_start + i]."""
    i = tl.program_id(0)
    at = row_start + i
    row = at
    if SOME_ROWS:
        row = tl.load(rows + at)
    stop = tl.load(row_offsets + row + 1)
    if SOME_ROWS:
        # the last row again, to fill up: two programs must not write one entry, should a product round them differently
        stop = tl.where(tl.load(rows + at - 1, mask=at > 0, other=-1) == row, 0, stop)
    for first in range(tl.load(row_offsets + row), stop, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        exists = entry < stop
        column = tl.load(columns + entry, mask=exists, other=0).to(tl.int32)
        if SOME_COLUMNS:
            column = tl.load(column_ranks + column, mask=exists, other=0)
        found = tl.load(block + i.to(tl.int64) * n_columns + column, mask=exists, other=0.0)
        tl.store(entries + entry, found.to(entries.dtype.element_ty), mask=exists)


def read_entries(block: Tensor, mask: Mask, plan: Plan, row_start: int, entries: Tensor) -> None:
    """Write what ``block`` holds at the entries of its rows into ``entries`` (nnz).

    Args:
        block: (rows, columns of the plan), contiguous.
        row_start: of the block, among the plan's rows.
    """
    some_rows, some_columns = plan.rows is not None, plan.column_ranks is not None
    with launching_on(block.device):
        entries_kernel[(block.shape[0],)](
            block,
            *mask,
            plan.rows if some_rows else mask.row_offsets,
            plan.column_ranks if some_columns else mask.row_offsets,
            entries,
            row_start,
            block.shape[1],
            SOME_ROWS=some_rows,
            SOME_COLUMNS=some_columns,
            BLOCK=_BLOCK,
        )
