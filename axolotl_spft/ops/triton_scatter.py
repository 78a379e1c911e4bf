"""Triton kernel of `axolotl_spft.ops.scatter`: positions, sum, rounding and scattered write in one pass.

The time goes to scattered memory accesses, so there is nothing to tune: no block size changes how many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.csr import Mask, strides
from axolotl_spft.ops.launch import launch

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


def assign_sum_(weight: Tensor, mask: Mask, originals: Tensor, values: Tensor, transposed: bool) -> None:
    """See `axolotl_spft.ops.scatter.assign_sum_`."""
    _launch(weight, mask, originals, values, transposed)


def assign_(weight: Tensor, mask: Mask, originals: Tensor, transposed: bool) -> None:
    """See `axolotl_spft.ops.scatter.assign_`."""
    _launch(weight, mask, originals, originals, transposed, with_values=False)


def add_at_(weight: Tensor, mask: Mask, values: Tensor, transposed: bool) -> None:
    """See `axolotl_spft.ops.scatter.add_at_`."""
    _launch(weight, mask, weight, values, transposed, from_weight=True)


def _launch(
    weight: Tensor,
    mask: Mask,
    originals: Tensor,
    values: Tensor,
    transposed: bool,
    from_weight: bool = False,
    with_values: bool = True,
) -> None:
    tensors = (weight, *mask, originals, values)
    launch(
        scatter_kernel,
        (mask.out_features,),
        tensors,
        strides(weight, transposed),
        (from_weight, with_values, BLOCK),
        num_warps=WARPS,
    )
