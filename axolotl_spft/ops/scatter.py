"""The sum of a weight and a sparse delta, written into the weight at the delta's positions, and taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops import cpu
from axolotl_spft.ops.csr import Mask, positions
from axolotl_spft.ops.dispatch import use_c, use_triton


def assign_sum_(
    weight: Tensor, mask: Mask, originals: Tensor, values: Tensor, transposed: bool = False, backend: str = "auto"
) -> None:
    """weight[mask] = originals + values, rounded once; repeating it changes nothing.

    Args:
        weight: (out_features, in_features), or (in_features, out_features) if ``transposed``; contiguous; changed in
            place.
        originals: (nnz) in the dtype of ``weight``.
        values: (nnz).
        backend: see `axolotl_spft.ops.dispatch`.
    """
    if use_triton(backend, weight, originals, values):
        from axolotl_spft.ops import triton_scatter

        triton_scatter.assign_sum_(weight, mask, originals, values, transposed)
        return
    if use_c(backend, weight, originals, values):
        cpu.assign_sum_(weight, mask, originals, values, transposed)
        return
    weight.put_(positions_in(weight, mask, transposed), rounded_sum(originals, values))


def assign_(weight: Tensor, mask: Mask, originals: Tensor, transposed: bool = False, backend: str = "auto") -> None:
    """weight[mask] = originals, bit for bit; arguments as in `assign_sum_`."""
    if use_triton(backend, weight, originals):
        from axolotl_spft.ops import triton_scatter

        triton_scatter.assign_(weight, mask, originals, transposed)
        return
    if use_c(backend, weight, originals):
        cpu.assign_sum_(weight, mask, originals, None, transposed)
        return
    weight.put_(positions_in(weight, mask, transposed), originals)


def add_at_(weight: Tensor, mask: Mask, values: Tensor, transposed: bool = False, backend: str = "auto") -> None:
    """weight[mask] += values, rounded once; arguments as in `assign_sum_`."""
    if use_triton(backend, weight, values):
        from axolotl_spft.ops import triton_scatter

        triton_scatter.add_at_(weight, mask, values, transposed)
        return
    if use_c(backend, weight, values):
        cpu.assign_sum_(weight, mask, None, values, transposed)
        return
    at = positions_in(weight, mask, transposed)
    weight.put_(at, rounded_sum(weight.take(at), values))


def positions_in(weight: Tensor, mask: Mask, transposed: bool = False) -> Tensor:
    """Where the entries stand in the flattened ``weight`` as it is stored: (nnz) int64."""
    return positions(mask, weight.shape[0 if transposed else 1], transposed)


def rounded_sum(weight: Tensor, values: Tensor) -> Tensor:
    """weight + values with one rounding, in the dtype of ``weight``."""
    return torch.add(weight, values, out=torch.empty_like(weight))
