"""The gradient of the values through the compact rows x columns product."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.plan import Plan


def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """X[:, columns] as (tokens, columns.numel()), for x (..., features) and int64 columns."""
    x = x.reshape(-1, x.shape[-1])
    if columns.numel() == x.shape[1]:
        return x
    # several times faster than index_select along the last dimension, which copies entry by entry; and as integers,
    # where a 16-bit float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.expand(x.shape[0], -1)).view(x.dtype)


def values_grad(grad_y: Tensor, x_columns: Tensor, plan: Plan) -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], block of rows by block of rows.

    Args:
        grad_y: dY, (..., out_features), contiguous.
        x_columns: X[:, columns], (tokens, columns), from `select_columns`.
        plan: of the mask.

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    grad_y = grad_y.view(-1, grad_y.shape[-1])
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
