"""The sparse delta beside a base layer whose weight cannot be read: y = base(x) + x S^T."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.csr import Mask, row_indices
from axolotl_spft.ops.plan import Plan


def add_sparse_branch(y: Tensor, x: Tensor, values: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """y + x S^T, through the dense rows x columns block of S; differentiable.

    Args:
        y: (..., out_features), the base layer's output.
        x: (..., in_features).
        values: (nnz).
    """
    rows = torch.searchsorted(plan.rows, row_indices(mask))
    columns = torch.searchsorted(plan.columns, mask.columns.to(torch.int64))
    block = values.new_zeros(plan.rows.numel(), plan.columns.numel()).index_put((rows, columns), values)
    delta = x.index_select(-1, plan.columns).to(y.dtype) @ block.t().to(y.dtype)
    return y.index_add(-1, plan.rows, delta)
