"""The sum of a weight and a sparse delta, written into the weight at the delta's positions, and taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.backends import cpu
from axolotl_spft.ops.backends.dispatch import use_c, use_triton
from axolotl_spft.ops.backends.presence import check_present
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.ops.weight.stacked import by_expert, memory_positions


def write_sum_(
    weight: Tensor, mask: Mask, originals: Tensor, values: Tensor, transposed: bool = False, backend: str = "auto"
) -> None:
    """originals = weight[mask], then weight[mask] += values, rounded once.

    Args:
        weight: (out_features, in_features), or (in_features, out_features) if ``transposed``; or experts of three
            dimensions, see `axolotl_spft.ops.weight.stacked`; contiguous; changed in place.
        originals: (nnz) in the dtype of ``weight``; changed in place.
        values: (nnz).
        backend: see `axolotl_spft.ops.backends.dispatch`.
    """
    _write(weight, mask, originals, values, transposed, backend)


def restore_(weight: Tensor, mask: Mask, originals: Tensor, transposed: bool = False, backend: str = "auto") -> None:
    """weight[mask] = originals: as before `write_sum_`, bit for bit; arguments as there."""
    _write(weight, mask, originals, None, transposed, backend)


def add_at_(weight: Tensor, mask: Mask, values: Tensor, transposed: bool = False, backend: str = "auto") -> None:
    """weight[mask] += values, rounded once; arguments as in `write_sum_`."""
    _write(weight, mask, None, values, transposed, backend)


def assign_sum_(
    weight: Tensor, mask: Mask, originals: Tensor, values: Tensor, transposed: bool = False, backend: str = "auto"
) -> None:
    """weight[mask] = originals + values, rounded once, whatever stood there.

    Args:
        originals: (nnz), of a dtype that that of ``weight`` holds exactly; not changed. The others are those of
            `write_sum_`.
    """
    restore_(weight, mask, rounded_sum(originals.to(weight.dtype), values), transposed, backend)


def _write(
    weight: Tensor, mask: Mask, originals: Tensor | None, values: Tensor | None, transposed: bool, backend: str
) -> None:
    """weight[mask] += values, keeping what stood there in ``originals`` if given; = originals without ``values``."""
    check_present(mask.row_offsets, weight=weight)
    check_present(weight, originals=originals, values=values, columns=mask.columns, row_offsets=mask.row_offsets)
    if weight.ndim == 3 and not transposed:
        weight = weight.flatten(0, 1)
    given = [tensor for tensor in (originals, values) if tensor is not None]
    # transposed experts are no matrix of rows and columns at fixed distances, which the kernels know
    is_matrix = weight.ndim == 2
    if is_matrix and use_triton(backend, weight, *given):
        from axolotl_spft.ops.weight import triton_scatter

        triton_scatter.write_(weight, mask, originals, values, transposed)
        return
    if is_matrix and use_c(backend, weight, *given):
        cpu.write_(weight, mask, originals, values, transposed)
        return
    at = positions_in(weight, mask, transposed)
    # not put_, which torch refuses where algorithms are to be deterministic
    flat = weight.view(-1)
    if values is None:
        flat[at] = originals
        return
    before = weight.take(at)
    if originals is not None:
        originals.copy_(before)
    flat[at] = rounded_sum(before, values)


def positions_in(weight: Tensor, mask: Mask, transposed: bool = False) -> Tensor:
    """Where the entries stand in the flattened ``weight`` as it is stored: (nnz) int64."""
    if weight.ndim == 3:
        return memory_positions(mask, by_expert(weight, transposed))
    return positions(mask, weight.shape[0 if transposed else 1], transposed)


def rounded_sum(weight: Tensor, values: Tensor) -> Tensor:
    """weight + values with one rounding, in the dtype of ``weight``."""
    return torch.add(weight, values, out=torch.empty_like(weight))
