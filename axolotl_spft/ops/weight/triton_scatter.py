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
    FROM_WEIGHT: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[mask] = base + values in one row, or base; base is weight[mask] where FROM_WEIGHT, else ``originals``."""
    for first in range(first_entry, stop, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        exists = entry < stop
        target = row_start + tl.load(columns + entry, mask=exists, other=0).to(tl.int64) * column_stride
        if FROM_WEIGHT:
            base = tl.load(target, mask=exists, other=0.0)
        else:
            base = tl.load(originals + entry, mask=exists, other=0.0)
        if WITH_VALUES:
            total = base.to(tl.float32) + tl.load(values + entry, mask=exists, other=0.0).to(tl.float32)
            tl.store(target, total.to(row_start.dtype.element_ty), mask=exists)
        else:
            tl.store(target, base, mask=exists)


@triton.jit
def scatter_kernel(
    weight,
    columns,
    row_offsets,
    originals,
    values,
    row_stride,
    column_stride,
    FROM_WEIGHT: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one weight."""
    row = tl.program_id(0)
    first, stop = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    row_start = weight + row.to(tl.int64) * row_stride
    write_row(row_start, columns, first, stop, originals, values, column_stride, FROM_WEIGHT, WITH_VALUES, BLOCK)


def assign_sum_(weight: Tensor, mask: Mask, originals: Tensor | None, values: Tensor | None, transposed: bool) -> None:
    """weight[mask] = originals + values; += values without ``originals``, = originals without ``values``."""
    from_weight, with_values = originals is None, values is not None
    # what is not read has to be a tensor all the same
    tensors = (weight, *mask, weight if from_weight else originals, values if with_values else originals)
    launch(
        scatter_kernel,
        (mask.out_features,),
        tensors,
        strides(weight, transposed),
        (from_weight, with_values, BLOCK),
        num_warps=WARPS,
    )
