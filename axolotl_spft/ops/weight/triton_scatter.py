"""Triton kernel of `axolotl_spft.ops.weight.scatter`: positions, sum, rounding and scattered write in one pass.

The time goes to scattered memory accesses, so there is nothing to tune: no block size changes how many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.backends.launch import launch
from axolotl_spft.ops.mask.csr import Mask, strides

# entries of a row that a program works on at a time, in one warp: most rows of a mask by gradient hold fewer, the
# fullest thousands
BLOCK, WARPS = 128, 1


@triton.jit
def write_row(
    row_start,
    columns,
    first_entry,
    stop,
    originals,
    values,
    column_stride,
    KEEPING: tl.constexpr,
    ADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: weight[mask] += values where ADDING, after a copy to ``originals`` where KEEPING; else = originals."""
    for first in range(first_entry, stop, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        exists = entry < stop
        target = row_start + tl.load(columns + entry, mask=exists, other=0).to(tl.int64) * column_stride
        if ADDING:
            before = tl.load(target, mask=exists, other=0.0)
            if KEEPING:
                tl.store(originals + entry, before, mask=exists)
            total = before.to(tl.float32) + tl.load(values + entry, mask=exists, other=0.0).to(tl.float32)
            tl.store(target, total.to(row_start.dtype.element_ty), mask=exists)
        else:
            tl.store(target, tl.load(originals + entry, mask=exists, other=0.0), mask=exists)


@triton.jit
def scatter_kernel(
    weight,
    columns,
    row_offsets,
    originals,
    values,
    row_stride,
    column_stride,
    KEEPING: tl.constexpr,
    ADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one weight."""
    row = tl.program_id(0)
    first, stop = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    row_start = weight + row.to(tl.int64) * row_stride
    write_row(row_start, columns, first, stop, originals, values, column_stride, KEEPING, ADDING, BLOCK)


def write_(weight: Tensor, mask: Mask, originals: Tensor | None, values: Tensor | None, transposed: bool) -> None:
    """weight[mask] += values, keeping what stood there in ``originals`` if given; = originals without ``values``."""
    keeping, adding = originals is not None, values is not None
    # what is not used has to be a tensor all the same
    tensors = (weight, *mask, originals if keeping else weight, values if adding else originals)
    launch(
        scatter_kernel,
        (mask.out_features,),
        tensors,
        strides(weight, transposed),
        (keeping, adding, BLOCK),
        num_warps=WARPS,
    )
