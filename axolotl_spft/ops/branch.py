"""The sparse delta beside a base layer whose weight cannot be read: y = base(x) + x S^T."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.backends.presence import check_present
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan, block_slots


def add_sparse_branch(y: Tensor, x: Tensor, values: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """y + x S^T, block by block of the dense rows x columns product; differentiable.

    Args:
        y: (..., out_features), the base layer's output.
        x: (..., in_features).
        values: (nnz).
        plan: of the mask.
    """
    check_present(x, values=values, columns=mask.columns, row_offsets=mask.row_offsets)
    x_columns = (x if plan.columns is None else x.index_select(-1, plan.columns)).to(y.dtype)
    used = torch.arange(y.shape[-1], device=y.device) if plan.rows is None else plan.rows
    for rows, part in plan.blocks():
        n_rows = rows.stop - rows.start
        slots = block_slots(plan, mask, rows, part).to(torch.int64)
        block = values.new_zeros(n_rows * plan.n_columns).index_put((slots,), values[part])
        delta = x_columns @ block.view(n_rows, -1).t().to(y.dtype)
        y = y.index_add(-1, used[rows], delta)
    return y
