"""Triton kernel of `axolotl_spft.ops.weight.sums`: many weights in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.backends.launch import launch
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.weight.triton_scatter import BLOCK, WARPS, write_row


@triton.jit
def sums_kernel(
    fields,
    groups,
    weight,
    columns,
    row_offsets,
    originals,
    values,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    RESTORING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one of many weights; the typed pointers are those of any one of them."""
    group = tl.program_id(0) // GROUP
    field = fields + tl.load(groups + group) * FIELDS
    row = tl.program_id(0) - tl.load(field + 7).to(tl.int32) * GROUP
    if row < tl.load(field + 8):
        offset = tl.load(field + 2).to(row_offsets.dtype) + row
        row_start = tl.load(field).to(weight.dtype) + row.to(tl.int64) * tl.load(field + 5)
        write_row(
            row_start,
            tl.load(field + 1).to(columns.dtype),
            tl.load(offset),
            tl.load(offset + 1),
            tl.load(field + 3).to(originals.dtype),
            tl.load(field + 4).to(values.dtype),
            tl.load(field + 6),
            True,
            not RESTORING,
            BLOCK,
        )


def write_sums_(
    fields: Tensor,
    groups: Tensor,
    group: int,
    restoring: bool,
    weight: Tensor,
    mask: Mask,
    originals: Tensor,
    values: Tensor,
) -> None:
    """See `axolotl_spft.ops.weight.sums`; the tensors after ``restoring`` are those of any one of the sums."""
    tensors = (fields, groups, weight, *mask, originals, values)
    grid, constants = (groups.numel() * group,), (fields.shape[1], group, restoring, BLOCK)
    launch(sums_kernel, grid, tensors, constants=constants, num_warps=WARPS)
