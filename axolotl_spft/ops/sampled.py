"""The gradient of the values as one dot product over the tokens for each entry.

Of a product of rows and columns it computes nothing but the entries, at the speed of vectors rather than of matrices:
it pays where entries are few among the used rows and columns, as with a random mask. For CPUs.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from axolotl_spft.ops.columns import select_columns
from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.plan import Plan, column_ranks
from axolotl_spft.ops.products import product_lead


def sampling_pays(plan: Plan, nnz: int, grad_y: Tensor) -> bool:
    """Whether `sampled_values_grad` takes less time than the product of rows and columns; both grow with the tokens."""
    return grad_y.device.type == "cpu" and nnz * product_lead(grad_y.dtype) < plan.n_rows * plan.n_columns


def sampled_values_grad(grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """dV = (dY^T X)[mask]; sums in float32 (float64 for such tensors).

    Args:
        grad_y: dY, (tokens, out_features).
        kept: X[:, plan.columns], (tokens, columns).

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    left, right = _transposed(select_columns(grad_y, plan.rows)), _transposed(kept)
    _hear_of_the_beta_once()
    entries = torch.sparse_csr_tensor(
        plan.offsets, column_ranks(plan, mask.columns), left.new_zeros(mask.nnz), (len(left), len(right)),
        check_invariants=False,
    )  # fmt: skip
    return torch.sparse.sampled_addmm(entries, left, right.t(), beta=0.0).values().to(grad_y.dtype)


def _transposed(x: Tensor) -> Tensor:
    # the product would copy anything else, and take longer for it
    return x.t().contiguous().to(x.dtype if x.dtype == torch.float64 else torch.float32)


@functools.cache
def _hear_of_the_beta_once() -> None:
    """Have torch's warning that sparse tensors are in beta, which it gives once, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))
