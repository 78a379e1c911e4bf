"""Copies of some columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops import cpu
from axolotl_spft.ops.dispatch import use_c, use_triton
from axolotl_spft.ops.products import cast


def select_columns(x: Tensor, columns: Tensor | None, backend: str = "auto") -> Tensor:
    """X[:, columns] as (tokens, columns), for x (..., features); None: all, without a copy where x is contiguous.

    ``columns`` are int32 or int64. A GPU is faster where they ascend: then neighbours lie in one line of its cache. The
    C kernel stores the copy column by column. No gradient flows back through a copy.
    """
    if columns is None:
        return x.reshape(-1, x.shape[-1])
    if use_triton(backend, x):
        from axolotl_spft.ops import triton_columns

        return triton_columns.select_columns(x.reshape(-1, x.shape[-1]), columns)
    if use_c(backend, x):
        return cpu.select_columns(x, cast(columns, torch.int32))
    x = x.detach().reshape(-1, x.shape[-1])
    if x.is_cuda:
        return x.index_select(1, columns)
    # on a CPU several times faster than index_select, which copies entry by entry; and as integers, where a 16-bit
    # float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.to(torch.int64).expand(x.shape[0], -1)).view(x.dtype)
