"""The gradient of the values, by the product that takes the least time for the mask at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.columns import select_columns
from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.dispatch import use_triton
from axolotl_spft.ops.plan import Plan, block_slots
from axolotl_spft.ops.products import product_dtype
from axolotl_spft.ops.sampled import sampled_values_grad, sampling_pays
from axolotl_spft.ops.tiles import Tiles, make_tiles, tiles_of


def values_grad(grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan, backend: str = "auto") -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], whole, or only the tiles that hold entries, or only the entries.

    Args:
        grad_y: dY, (..., out_features), contiguous.
        kept: X[:, plan.kept], (tokens, columns), from `axolotl_spft.ops.columns.select_columns`.
        plan: of the mask.
        backend: see `axolotl_spft.ops.dispatch`; ``triton`` is the product by tiles.

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    grad_y, x_columns = grad_y.view(-1, grad_y.shape[-1]), select_columns(kept, plan.places)
    if use_triton(backend, grad_y, x_columns):
        tiles = make_tiles(mask, plan) if backend == "triton" else _paying_tiles(grad_y, mask, plan)
        if tiles is not None:
            from axolotl_spft.ops.triton_values_grad import tiles_values_grad

            return tiles_values_grad(grad_y, x_columns, tiles)
    elif backend == "auto" and sampling_pays(plan, mask.nnz, grad_y):
        return sampled_values_grad(grad_y, x_columns, mask, plan)
    return compact_values_grad(grad_y, x_columns, mask, plan)


def compact_values_grad(grad_y: Tensor, x_columns: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """dV by the product of the used rows and columns, block of rows by block of rows.

    Args:
        grad_y: dY, (tokens, out_features).
        x_columns: X[:, plan.columns], (tokens, columns).

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    dtype = product_dtype(grad_y)
    x_columns = x_columns.to(dtype)
    slots = block_slots(plan, mask)
    grads, row_start, value_start = [], 0, 0
    for row_stop, value_stop in zip(plan.row_stops, plan.value_stops):
        if plan.rows is None:
            grad_rows = grad_y[:, row_start:row_stop]
        else:
            grad_rows = select_columns(grad_y, plan.rows[row_start:row_stop])
        block = grad_rows.to(dtype).t().mm(x_columns)
        grads.append(block.view(-1).index_select(0, slots[value_start:value_stop]))
        row_start, value_start = row_stop, value_stop
    return (grads[0] if len(grads) == 1 else torch.cat(grads)).to(grad_y.dtype)


def _paying_tiles(grad_y: Tensor, mask: Mask, plan: Plan) -> Tiles | None:
    # without tensor cores the product of few tiles has no lead
    return tiles_of(mask, plan) if grad_y.element_size() == 2 else None
