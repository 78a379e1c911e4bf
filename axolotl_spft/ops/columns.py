"""Copies of some columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.dispatch import use_triton


def select_columns(x: Tensor, columns: Tensor | None, backend: str = "auto") -> Tensor:
    """X[:, columns] as (tokens, columns), for x (..., features); None: all, without a copy where x is contiguous.

    Args:
        columns: int32 or int64; ascending ones are read several times as fast as others on a GPU.
        backend: see `axolotl_spft.ops.dispatch`.
    """
    x = x.reshape(-1, x.shape[-1])
    if columns is None:
        return x
    if use_triton(backend, x):
        from axolotl_spft.ops import triton_columns

        return triton_columns.select_columns(x, columns)
    # several times faster than index_select along the last dimension, which copies entry by entry; and as integers,
    # where a 16-bit float would be widened and rounded back
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    return bits.gather(1, columns.to(torch.int64).expand(x.shape[0], -1)).view(x.dtype)
