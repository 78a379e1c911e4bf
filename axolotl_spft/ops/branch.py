"""The sparse delta beside a base layer whose weight cannot be read: y = base(x) + x S^T."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.plan import Plan, block_slots


def add_sparse_branch(y: Tensor, x: Tensor, values: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """y + x S^T, block by block of the dense rows x columns product; differentiable.

    Args:
        y: (..., out_features), the base layer's output.
        x: (..., in_features).
        values: (nnz).
        plan: of the mask.
    """
    x_columns = (x if plan.columns is None else x.index_select(-1, plan.columns)).to(y.dtype)
    rows = torch.arange(y.shape[-1], device=y.device) if plan.rows is None else plan.rows
    slots = block_slots(plan, mask).to(torch.int64)
    row_start = value_start = 0
    for row_stop, value_stop in zip(plan.row_stops, plan.value_stops):
        block = values.new_zeros((row_stop - row_start) * plan.n_columns)
        block = block.index_put((slots[value_start:value_stop],), values[value_start:value_stop])
        delta = x_columns @ block.view(row_stop - row_start, -1).t().to(y.dtype)
        y = y.index_add(-1, rows[row_start:row_stop], delta)
        row_start, value_start = row_stop, value_stop
    return y
