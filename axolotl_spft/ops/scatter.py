"""The sum of a weight and a sparse delta, written into the weight at the delta's positions."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.dispatch import use_triton


def assign_sum_(weight: Tensor, positions: Tensor, originals: Tensor, values: Tensor, backend: str = "auto") -> None:
    """weight.view(-1)[positions] = originals + values, rounded once; repeating it changes nothing.

    Args:
        weight: contiguous, of any shape; changed in place.
        positions: (nnz; int32 or int64), without repeats.
        originals: (nnz) in the dtype of ``weight``.
        values: (nnz).
        backend: see `axolotl_spft.ops.dispatch`.
    """
    if use_triton(backend, weight, originals, values):
        from axolotl_spft.ops import triton_scatter

        triton_scatter.assign_sum_(weight, positions, originals, values)
        return
    # put_ wants int64; the conversion costs less than what indexing does for int32 by itself
    weight.put_(positions.to(torch.int64), _rounded_sum(originals, values))


def add_at_(weight: Tensor, positions: Tensor, values: Tensor, backend: str = "auto") -> None:
    """weight.view(-1)[positions] += values, rounded once; arguments as in `assign_sum_`."""
    if use_triton(backend, weight, values):
        from axolotl_spft.ops import triton_scatter

        triton_scatter.add_at_(weight, positions, values)
        return
    flat = weight.view(-1)
    flat[positions] = _rounded_sum(flat[positions], values)


def _rounded_sum(weight: Tensor, values: Tensor) -> Tensor:
    """weight + values with one rounding, in the dtype of ``weight``."""
    return torch.add(weight, values, out=torch.empty_like(weight))
