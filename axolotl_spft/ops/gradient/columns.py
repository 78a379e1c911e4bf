"""Copies of some columns of a matrix, and of the output of an RMS norm from what went into it."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.backends import cpu
from axolotl_spft.ops.backends.dispatch import use_c, use_triton
from axolotl_spft.ops.backends.products import cast


def select_columns(x: Tensor, columns: Tensor | None, backend: str = "auto") -> Tensor:
    """X[:, columns] as (tokens, columns), for x (..., features); None: all, without a copy where x is contiguous.

    ``columns`` are int32 or int64. A GPU is faster where they ascend: then neighbours lie in one line of its cache. The
    C kernel stores the copy column by column. No gradient flows back through a copy.
    """
    if columns is None:
        return x.reshape(-1, x.shape[-1])
    x = x.detach().reshape(-1, x.shape[-1])
    if use_triton(backend, x):
        from axolotl_spft.ops.gradient import triton_columns

        return triton_columns.select_columns(x, columns)
    if use_c(backend, x):
        return cpu.select_columns(x, cast(columns, torch.int32))
    if x.is_cuda:
        return x.index_select(1, columns)
    # on a CPU several times faster than index_select, which copies entry by entry; and as integers, where a 16-bit
    # float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.to(torch.int64).expand(x.shape[0], -1)).view(x.dtype)


def select_normed_columns(
    h: Tensor,
    scale: Tensor,
    weight: Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
    rounds: bool,
    backend: str = "auto",
) -> Tensor:
    """round(round(H r) w)[:, columns] as (tokens, columns) in ``dtype``, with the bits of these operations in torch.

    Args:
        h: H, (..., features), float32 and contiguous.
        scale: r, (..., 1), float32 and contiguous.
        weight: w of these columns only, (columns), float32.
        columns: int32; None: all.
        dtype: of the result.
        rounds: whether H r is rounded to ``dtype`` before it is multiplied with w.
        backend: see `axolotl_spft.ops.backends.dispatch`. The C kernel stores the result column by column.
    """
    if use_triton(backend, h, scale, weight):
        from axolotl_spft.ops.gradient import triton_columns

        return triton_columns.select_normed_columns(h, scale, weight, columns, dtype, rounds)
    if use_c(backend, h, scale, weight, dtype=dtype):
        return cpu.select_normed_columns(h, scale, weight, columns, dtype, rounds)
    normed = select_columns(h, columns, backend="torch") * scale.reshape(-1, 1)
    return (normed.to(dtype) if rounds else normed).mul(weight).to(dtype)
