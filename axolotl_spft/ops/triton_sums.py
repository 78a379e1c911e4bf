"""Triton kernel that writes the sums of many weights and their sparse deltas in one launch.

A forward pass on a GPU waits for the host, and a launch for each layer takes it longer than the GPU takes to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.dispatch import blocks
from axolotl_spft.ops.launch import launch
from axolotl_spft.ops.triton_scatter import BLOCK, WARPS, strides, write_row

# rows of one weight that stand behind each other in the grid
_GROUP = 64


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
    BLOCK: tl.constexpr,
):
    """One row of one of many weights, as `Sums` describes them; the typed pointers are those of any one of them."""
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
            False,
            BLOCK,
        )


class Sum(NamedTuple):
    """What `axolotl_spft.ops.scatter.assign_sum_` is given."""

    weight: Tensor
    mask: Mask
    originals: Tensor
    values: Tensor
    transposed: bool


class Sums(NamedTuple):
    """Many sums, whose tensors have the same dtypes and are on one device, by their addresses.

    Attributes:
        fields: (sums, 9; int64) addresses of weight, columns, row offsets, originals and values; strides of rows and of
            columns; the first group; out_features.
        groups: (groups; int32) the sum that each group of `_GROUP` rows belongs to.
        example: one of the sums.
    """

    fields: Tensor
    groups: Tensor
    example: Sum


def collect_sums(sums: Iterable[Sum]) -> list[Sums]:
    """``sums`` by the dtypes and the device of their tensors."""
    alike: dict[tuple, list[Sum]] = {}
    for each in sums:
        key = (each.weight.device, *(tensor.dtype for tensor in (each.weight, *each.mask, each.originals, each.values)))
        alike.setdefault(key, []).append(each)
    return [_collect(some) for some in alike.values()]


def _collect(sums: Sequence[Sum]) -> Sums:
    device = sums[0].weight.device
    groups = [blocks(each.mask.out_features, _GROUP) for each in sums]
    fields = [
        [tensor.data_ptr() for tensor in (each.weight, *each.mask, each.originals, each.values)]
        + [*strides(each.weight, each.transposed), first, each.mask.out_features]
        for each, first in zip(sums, accumulate(groups, initial=0))
    ]
    which = torch.arange(len(sums), dtype=torch.int32).repeat_interleave(torch.tensor(groups))
    return Sums(torch.tensor(fields, dtype=torch.int64, device=device), which.to(device), sums[0])


def assign_sums_(sums: Sums) -> None:
    """`axolotl_spft.ops.scatter.assign_sum_` of all of them; their tensors must still be where they were."""
    weight, mask, originals, values, _ = sums.example
    tensors = (sums.fields, sums.groups, weight, *mask, originals, values)
    grid, constants = (sums.groups.numel() * _GROUP,), (sums.fields.shape[1], _GROUP, BLOCK)
    launch(sums_kernel, grid, tensors, constants=constants, num_warps=WARPS)
