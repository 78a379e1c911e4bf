"""The gradient of the values through the compact rows x columns product."""

from __future__ import annotations

import torch
from torch import Tensor


def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """X[:, columns] as a new tensor (tokens, columns.numel()), for x (..., features) and int64 columns."""
    x = x.reshape(-1, x.shape[-1])
    # several times faster than index_select along the last dimension, which copies entry by entry; and as integers,
    # where a 16-bit float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.expand(x.shape[0], -1)).view(x.dtype)


def values_grad(
    grad_y: Tensor, x_columns: Tensor, rows: Tensor, slots: Tensor, row_stops: list[int], value_stops: list[int]
) -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], block of rows by block of rows.

    Args:
        grad_y: dY, (..., out_features).
        x_columns: X[:, columns], (tokens, columns), from `select_columns`.
        rows, slots, row_stops, value_stops: of the mask's `Plan`.

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    grad_y = grad_y.reshape(-1, grad_y.shape[-1])
    grad = grad_y.new_empty(slots.numel())
    row_start = value_start = 0
    for row_stop, value_stop in zip(row_stops, value_stops):
        block = rows[row_start:row_stop]
        grad_rows = grad_y if block.numel() == grad_y.shape[1] else select_columns(grad_y, block)
        product = grad_rows.t() @ x_columns
        torch.index_select(product.view(-1), 0, slots[value_start:value_stop], out=grad[value_start:value_stop])
        row_start, value_start = row_stop, value_stop
    return grad
