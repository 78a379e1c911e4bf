"""The gradient of the values, by the product that takes the least time for the mask at hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from axolotl_spft.ops.backends.dispatch import use_triton
from axolotl_spft.ops.backends.products import product_dtype
from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.gradient.entries import entries_of
from axolotl_spft.ops.gradient.sampled import sampled_values_grad, sampling_pays
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan
from axolotl_spft.ops.mask.tiles import Tiles, make_tiles, tiles_of


def values_grad(
    grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], whole, or only the tiles that hold entries, or only the entries.

    Args:
        grad_y: dY, (..., out_features), contiguous.
        kept: X[:, plan.columns], (tokens, columns), from `axolotl_spft.ops.gradient.columns.select_columns`.
        plan: of the mask.
        dtype: of the result; by default that of ``grad_y``.
        backend: see `axolotl_spft.ops.backends.dispatch`; ``triton`` is the product by tiles, ``c`` the sampled one.

    Returns:
        (nnz) in ``dtype``.
    """
    dtype = dtype or grad_y.dtype
    if grad_y.ndim != 2:
        grad_y = grad_y.view(-1, grad_y.shape[-1])
    if use_triton(backend, grad_y, kept):
        tiles = make_tiles(mask, plan) if backend == "triton" else _paying_tiles(grad_y, mask, plan)
        if tiles is not None:
            from axolotl_spft.ops.gradient.triton_values_grad import tiles_values_grad

            return tiles_values_grad(grad_y, kept, tiles, dtype)
    if backend == "c" or (backend == "auto" and sampling_pays(plan, mask.nnz, grad_y)):
        return sampled_values_grad(grad_y, kept, mask, plan, dtype, backend)
    return compact_values_grad(grad_y, kept, mask, plan, dtype)


def compact_values_grad(
    grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan, dtype: torch.dtype | None = None
) -> Tensor:
    """dV by the product of the used rows and columns, block of rows by block of rows.

    Args:
        grad_y: dY, (tokens, out_features).
        kept: X[:, plan.columns], (tokens, columns).
        dtype: of the result; by default that of ``grad_y``.

    Returns:
        (nnz) in ``dtype``.
    """
    return entries_of(_compact_blocks(grad_y, kept, plan), mask, plan, dtype or grad_y.dtype)


def _compact_blocks(grad_y: Tensor, kept: Tensor, plan: Plan) -> Iterator[Tensor]:
    """dY[:, rows]^T X[:, columns] for each of the plan's blocks of rows."""
    dtype = product_dtype(grad_y)
    kept = kept.to(dtype)
    for rows, _ in plan.blocks():
        grad_rows = grad_y[:, rows] if plan.rows is None else select_columns(grad_y, plan.rows[rows])
        yield grad_rows.to(dtype).t().mm(kept)


def _paying_tiles(grad_y: Tensor, mask: Mask, plan: Plan) -> Tiles | None:
    # without tensor cores the product of few tiles has no lead
    return tiles_of(mask, plan) if grad_y.element_size() == 2 else None
