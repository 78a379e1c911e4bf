"""The kernels for CPUs as functions of tensors: bfloat16 or float32, compiled by `backends.cpu_library`.

They read memory by its address, so shapes, dtypes and devices that do not fit are refused here; indices are those of a
mask, which is checked where it comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.backends.cpu_library import library
from axolotl_spft.ops.mask.csr import Mask, strides
from axolotl_spft.ops.mask.plan import Plan


def select_columns(x: Tensor, columns: Tensor | None) -> Tensor:
    """X[:, columns] for x (..., features) and columns (n; int32; None: all): (tokens, n), stored column by column.

    So the tokens of a column, which `sampled_values_grad` multiplies, are neighbours.
    """
    features = x.shape[-1]
    tokens, count = x.numel() // features, features if columns is None else columns.numel()
    copy = torch.empty_strided((tokens, count), (1, tokens), dtype=x.dtype)
    library(x.dtype).select_columns(
        x.data_ptr(), tokens, features, _address(columns), count, copy.data_ptr(), torch.get_num_threads()
    )
    return copy


def select_normed_columns(
    h: Tensor, scale: Tensor, weight: Tensor, columns: Tensor | None, dtype: torch.dtype, rounds: bool
) -> Tensor:
    """See `axolotl_spft.ops.gradient.columns.select_normed_columns`; stored as by `select_columns`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    tokens, features = scale.numel(), h.shape[-1]
    count = features if columns is None else columns.numel()
    if h.numel() != tokens * features or weight.numel() != count:
        raise ValueError(
            f"H {tuple(h.shape)}, r {tuple(scale.shape)} and w {tuple(weight.shape)} do not fit {count} columns"
        )
    copy = torch.empty_strided((tokens, count), (1, tokens), dtype=dtype)
    library(dtype).select_normed_columns(
        h.data_ptr(), _address(scale), _address(weight), rounds, tokens, features, _address(columns), count,
        copy.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return copy


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
    if kept.stride() != (1, kept.shape[0]):
        kept = select_columns(kept.contiguous(), None)
    grads = torch.empty(mask.nnz, dtype=torch.float32)
    library(grad_y.dtype).sampled_product(
        grad_y.data_ptr(), *grad_y.shape, _address(plan.rows), plan.n_rows, _address(plan.offsets),
        _address(mask.columns), mask.columns.element_size(), _address(plan.column_ranks), kept.data_ptr(),
        grads.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def write_(weight: Tensor, mask: Mask, originals: Tensor | None, values: Tensor | None, transposed: bool) -> None:
    """weight[mask] += values, keeping what stood there in ``originals`` if given; = originals without ``values``.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    fit = weight.shape[1 if transposed else 0] == mask.out_features
    if values is not None:
        fit = fit and values.numel() == mask.nnz
        # exact, and nothing to do for the values that are trained as a rule
        values = values.to(torch.float32)
    if originals is not None:
        fit = fit and originals.numel() == mask.nnz and originals.dtype == weight.dtype
    if not fit:
        raise ValueError(
            f"{None if values is None else values.numel()} values and a weight {tuple(weight.shape)} {weight.dtype} do "
            f"not fit a mask of {mask.nnz} entries in {mask.out_features} rows, or its original weights"
        )
    library(weight.dtype).write_sum(
        weight.data_ptr(), *strides(weight, transposed), mask.out_features, _address(mask.row_offsets),
        _address(mask.columns), mask.columns.element_size(), _address(originals), _address(values),
        torch.get_num_threads(),
    )  # fmt: skip


def write_sums_(
    fields: Tensor, groups: Tensor, group: int, dtype: torch.dtype, column_bytes: int, restoring: bool
) -> None:
    """See `axolotl_spft.ops.weight.sums`: weights of ``dtype``, columns of ``column_bytes`` each, float32 values."""
    library(dtype).write_sums(
        fields.data_ptr(), fields.shape[1], groups.data_ptr(), groups.numel(), group, column_bytes, restoring,
        torch.get_num_threads(),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise RuntimeError(f"an input or a base weight lies on the CPU, and its sparse delta on {tensor.device}")
    return tensor.data_ptr()
