"""The sums of many weights and their sparse deltas, written at once, and taken back at once.

A forward pass waits for the host, and to write for each layer takes that longer than the writing itself: on a GPU a
launch, on a CPU what Python takes with the caches full of the layer before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.backends import cpu
from axolotl_spft.ops.backends.dispatch import blocks, use_c, use_triton
from axolotl_spft.ops.mask.csr import Mask, strides

# rows of one weight that a program, or a thread, writes one after the other
GROUP = 64


class Sum(NamedTuple):
    """What `axolotl_spft.ops.weight.scatter.write_sum_` is given."""

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
        groups: (groups; int32) the sum that each group of `GROUP` rows belongs to.
        example: one of the sums.
    """

    fields: Tensor
    groups: Tensor
    example: Sum


def can_collect(weight: Tensor, values: Tensor) -> bool:
    """Whether `write_sums_` can write the sum of these tensors."""
    # the C kernel reads the values where they are
    return use_triton("auto", weight, values) or (values.dtype == torch.float32 and use_c("auto", weight, values))


def collect_sums(sums: Iterable[Sum]) -> list[Sums]:
    """``sums`` by the dtypes and the device of their tensors."""
    alike: dict[tuple, list[Sum]] = {}
    for each in sums:
        key = (each.weight.device, *(tensor.dtype for tensor in (each.weight, *each.mask, each.originals, each.values)))
        alike.setdefault(key, []).append(each)
    return [_collect(some) for some in alike.values()]


def _collect(sums: Sequence[Sum]) -> Sums:
    device = sums[0].weight.device
    groups = [blocks(each.mask.out_features, GROUP) for each in sums]
    fields = [
        [tensor.data_ptr() for tensor in (each.weight, *each.mask, each.originals, each.values)]
        + [*strides(each.weight, each.transposed), first, each.mask.out_features]
        for each, first in zip(sums, accumulate(groups, initial=0))
    ]
    which = torch.arange(len(sums), dtype=torch.int32).repeat_interleave(torch.tensor(groups))
    return Sums(torch.tensor(fields, dtype=torch.int64, device=device), which.to(device), sums[0])


def write_sums_(sums: Sums, backend: str = "auto") -> None:
    """`axolotl_spft.ops.weight.scatter.write_sum_` of all of them; their tensors must still be where they were.

    Args:
        backend: see `axolotl_spft.ops.backends.dispatch`; ``torch`` has no such operation.
    """
    _write(sums, backend, restoring=False)


def restore_sums_(sums: Sums, backend: str = "auto") -> None:
    """`axolotl_spft.ops.weight.scatter.restore_` of all of them."""
    _write(sums, backend, restoring=True)


def _write(sums: Sums, backend: str, restoring: bool) -> None:
    weight, mask, originals, values, _ = sums.example
    if use_triton(backend, weight, originals, values):
        from axolotl_spft.ops.weight import triton_sums

        triton_sums.write_sums_(sums.fields, sums.groups, GROUP, restoring, weight, mask, originals, values)
    elif not use_c(backend, weight, originals, values):
        raise SpftError(f"backend: {backend!r} cannot write many sums at once: write each of them by itself")
    else:
        cpu.write_sums_(sums.fields, sums.groups, GROUP, weight.dtype, mask.columns.element_size(), restoring)
