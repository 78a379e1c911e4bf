"""Triton kernel of `axolotl_spft.ops.gradient.entries`: finds the place of each entry and reads it in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.backends.launch import launch
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan

_BLOCK = 512


@triton.jit
def entries_kernel(
    block,
    columns,
    offsets,
    column_ranks,
    entries,
    row_start,
    n_columns,
    SOME_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """entries = block[i, column_ranks[columns]] for row i of the block, which is row row_start + i of the plan's."""
    i = tl.program_id(0)
    stop = tl.load(offsets + row_start + i + 1)
    for first in range(tl.load(offsets + row_start + i), stop, BLOCK):
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
    some_columns = plan.column_ranks is not None
    ranks = plan.column_ranks if some_columns else plan.offsets
    tensors = (block, mask.columns, plan.offsets, ranks, entries)
    launch(entries_kernel, block.shape[:1], tensors, (row_start, block.shape[1]), (some_columns, _BLOCK))
