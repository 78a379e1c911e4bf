"""The gradient of the values through the compact rows x columns product."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.csr import Mask


def values_grad(
    grad_y: Tensor,
    x_columns: Tensor,
    mask: Mask,
    rows: Tensor,
    columns: Tensor,
    row_stops: list[int],
    value_stops: list[int],
    in_features: int,
) -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask], block of rows by block of rows.

    Args:
        grad_y: dY, (tokens, out_features).
        x_columns: X[:, columns], (tokens, columns.numel()).
        mask: the CSR mask; the other arguments are those of its `Plan`.

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    out_features = mask.out_features
    rank_of_column = torch.zeros(in_features, dtype=torch.int64, device=columns.device)
    rank_of_column[columns] = torch.arange(columns.numel(), device=columns.device)
    column_ranks = rank_of_column[mask.columns.to(torch.int64)]
    counts = mask.row_offsets.diff()[rows]
    row_ranks = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), counts, output_size=mask.nnz)
    slots = row_ranks.mul_(columns.numel()).add_(column_ranks)

    grad = grad_y.new_empty(mask.nnz)
    row_start = value_start = 0
    for row_stop, value_stop in zip(row_stops, value_stops):
        block = rows[row_start:row_stop]
        grad_rows = grad_y if block.numel() == out_features else grad_y.index_select(1, block)
        product = grad_rows.t() @ x_columns
        first_slot = row_start * columns.numel()
        torch.index_select(
            product.view(-1), 0, slots[value_start:value_stop] - first_slot, out=grad[value_start:value_stop]
        )
        row_start, value_start = row_stop, value_stop
    return grad
