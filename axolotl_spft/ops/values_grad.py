"""The gradient of the values through the compact rows x columns product."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.dispatch import use_triton
from axolotl_spft.ops.plan import Plan
from axolotl_spft.ops.tiles import Tiles, make_tiles, tiles_of


def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """X[:, columns] as (tokens, columns.numel()), for x (..., features) and int64 columns, ascending where all."""
    x = x.reshape(-1, x.shape[-1])
    return x if columns.numel() == x.shape[1] else gather_columns(x, columns)


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """X[:, columns] in any order, for x (tokens, features) and int64 columns."""
    # several times faster than index_select along the last dimension, which copies entry by entry; and as integers,
    # where a 16-bit float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.expand(x.shape[0], -1)).view(x.dtype)


def values_grad(grad_y: Tensor, x_columns: Tensor, plan: Plan, backend: str = "auto") -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], block of rows by block of rows, or only the tiles that hold entries.

    Args:
        grad_y: dY, (..., out_features), contiguous.
        x_columns: X[:, columns], (tokens, columns), from `select_columns`.
        plan: of the mask.
        backend: see `axolotl_spft.ops.dispatch`; ``triton`` is the product by tiles.

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    grad_y = grad_y.view(-1, grad_y.shape[-1])
    if use_triton(backend, grad_y, x_columns):
        tiles = make_tiles(plan) if backend == "triton" else _paying_tiles(grad_y, plan)
        if tiles is not None:
            from axolotl_spft.ops.triton_values_grad import tiles_values_grad

            return tiles_values_grad(grad_y, x_columns, tiles)
    if len(plan.row_stops) == 1:
        return _block_grad(grad_y, x_columns, plan.rows, plan.slots)
    row_starts, value_starts = ([0, *stops[:-1]] for stops in (plan.row_stops, plan.value_stops))
    return torch.cat(
        [
            _block_grad(grad_y, x_columns, plan.rows[row_start:row_stop], plan.slots[value_start:value_stop])
            for row_start, row_stop, value_start, value_stop in zip(
                row_starts, plan.row_stops, value_starts, plan.value_stops
            )
        ]
    )


def _block_grad(grad_y: Tensor, x_columns: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return select_columns(grad_y, rows).t().mm(x_columns).view(-1).index_select(0, slots)


def _paying_tiles(grad_y: Tensor, plan: Plan) -> Tiles | None:
    # without tensor cores the product of few tiles has no lead
    return tiles_of(plan) if grad_y.element_size() == 2 else None
