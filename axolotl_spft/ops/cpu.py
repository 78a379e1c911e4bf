"""The kernels for CPUs as functions of tensors: bfloat16 or float32, compiled by `axolotl_spft.ops.cpu_library`.

They read memory by its address, so shapes and dtypes that do not fit are refused here; indices are those of a mask,
which is checked where it comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.cpu_library import library
from axolotl_spft.ops.csr import Mask
from axolotl_spft.ops.plan import Plan


def select_columns(x: Tensor, columns: Tensor | None) -> Tensor:
    """X[:, columns] for x (tokens, features) and columns (n; int32; None: all): (tokens, n), stored column by column.

    So the tokens of a column, which `sampled_values_grad` multiplies, are neighbours.
    """
    count = x.shape[1] if columns is None else columns.numel()
    copy = torch.empty(count, x.shape[0], dtype=x.dtype)
    library(x.dtype).select_columns(
        x.data_ptr(), *x.shape, _address(columns), count, copy.data_ptr(), torch.get_num_threads()
    )
    return copy.t()


def sampled_values_grad(grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """dV = (dY^T X)[mask] as one dot product over the tokens for each entry: (nnz) float32, its sums too.

    Args:
        grad_y: dY, (tokens, out_features).
        kept: X[:, plan.columns], (tokens, columns); fastest from `select_columns`.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    if (
        kept.dtype != grad_y.dtype
        or kept.shape != (grad_y.shape[0], plan.n_columns)
        or grad_y.shape[1] != mask.out_features
    ):
        raise ValueError(
            f"dY {tuple(grad_y.shape)} {grad_y.dtype} and X {tuple(kept.shape)} {kept.dtype} do not fit a mask of "
            f"{mask.out_features} rows and {plan.n_columns} columns"
        )
    runs = kept.t()
    if not runs.is_contiguous():
        runs = select_columns(kept.contiguous(), None).t()
    grads = torch.zeros(mask.nnz, dtype=torch.float32)
    library(grad_y.dtype).sampled_product(
        grad_y.data_ptr(), *grad_y.shape, _address(plan.rows), plan.n_rows, plan.offsets.data_ptr(),
        mask.columns.data_ptr(), mask.columns.element_size(), _address(plan.column_ranks), runs.data_ptr(),
        grads.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def assign_sum_(weight: Tensor, mask: Mask, originals: Tensor | None, values: Tensor, transposed: bool) -> None:
    """weight[mask] = originals + values, or weight[mask] += values where ``originals`` is None.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    fit = values.numel() == mask.nnz and weight.shape[1 if transposed else 0] == mask.out_features
    if originals is not None:
        fit = fit and originals.numel() == mask.nnz and originals.dtype == weight.dtype
    if not fit:
        raise ValueError(
            f"{values.numel()} values and a weight {tuple(weight.shape)} {weight.dtype} do not fit a mask of "
            f"{mask.nnz} entries in {mask.out_features} rows, or its original weights"
        )
    # exact, and nothing to do for the values that are trained as a rule
    values = values.to(torch.float32)
    row_stride, column_stride = weight.stride()[::-1] if transposed else weight.stride()
    library(weight.dtype).write_sums(
        weight.data_ptr(), row_stride, column_stride, mask.out_features, mask.row_offsets.data_ptr(),
        mask.columns.data_ptr(), mask.columns.element_size(), _address(originals), values.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
