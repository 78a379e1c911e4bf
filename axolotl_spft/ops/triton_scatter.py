"""Triton kernel of `axolotl_spft.ops.scatter`: sum, rounding and scattered write in one pass.

The time goes to scattered memory accesses, so there is nothing to tune: no block size changes how many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def scatter_kernel(weight, positions, originals, values, nnz, FROM_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """weight[positions] = base + values; base is weight[positions] where FROM_WEIGHT, else ``originals``."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < nnz
    target = weight + tl.load(positions + entry, mask=exists, other=0).to(tl.int64)
    if FROM_WEIGHT:
        base = tl.load(target, mask=exists, other=0.0)
    else:
        base = tl.load(originals + entry, mask=exists, other=0.0)
    total = base.to(tl.float32) + tl.load(values + entry, mask=exists, other=0.0).to(tl.float32)
    tl.store(target, total.to(weight.dtype.element_ty), mask=exists)


def assign_sum_(weight: Tensor, positions: Tensor, originals: Tensor, values: Tensor) -> None:
    """See `axolotl_spft.ops.scatter.assign_sum_`."""
    _launch(weight, positions, originals, values, from_weight=False)


def add_at_(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    """See `axolotl_spft.ops.scatter.add_at_`."""
    _launch(weight, positions, weight, values, from_weight=True)


def _launch(weight: Tensor, positions: Tensor, originals: Tensor, values: Tensor, from_weight: bool) -> None:
    nnz = values.numel()
    if nnz:
        # triton launches on the current device, which need not be the tensors'
        with torch.cuda.device_of(weight):
            scatter_kernel[(triton.cdiv(nnz, _BLOCK),)](
                weight, positions, originals, values, nnz, FROM_WEIGHT=from_weight, BLOCK=_BLOCK
            )
