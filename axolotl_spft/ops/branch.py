"""The sparse delta beside a base layer whose weight cannot be read: y = base(x) + x S^T."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.plan import Plan


def add_sparse_branch(y: Tensor, x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """y + x S^T, block by block of the dense rows x columns product; differentiable.

    Args:
        y: (..., out_features), the base layer's output.
        x: (..., in_features).
        values: (nnz).
    """
    x_columns = x.index_select(-1, plan.columns).to(y.dtype)
    row_start = value_start = 0
    for row_stop, value_stop in zip(plan.row_stops, plan.value_stops):
        rows = plan.rows[row_start:row_stop]
        block = values.new_zeros(rows.numel() * plan.columns.numel())
        block = block.index_put((plan.slots[value_start:value_stop].to(torch.int64),), values[value_start:value_stop])
        delta = x_columns @ block.view(rows.numel(), -1).t().to(y.dtype)
        y = y.index_add(-1, rows, delta)
        row_start, value_start = row_stop, value_stop
    return y
