"""Triton kernel of `axolotl_spft.ops.columns`.

Neighbouring threads read neighbouring columns of one token: where these ascend they lie in few lines of the cache, and
the time is that of reading the lines and writing the copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_TOKENS, _BLOCK_COLUMNS, _WARPS = 8, 128, 2


@triton.jit
def columns_kernel(
    x, columns, copy, tokens, n_columns, x_stride, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """copy[token, j] = x[token, columns[j]] for a block of tokens and columns."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column = tl.load(columns + j, mask=j < n_columns, other=0)
    exists = (token < tokens)[:, None] & (j < n_columns)[None, :]
    token = token.to(tl.int64)[:, None]
    found = tl.load(x + token * x_stride + column[None, :], mask=exists)
    tl.store(copy + token * n_columns + j[None, :], found, mask=exists)


def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """See `axolotl_spft.ops.columns.select_columns`; ``x`` (tokens, features) is contiguous."""
    tokens, n_columns = x.shape[0], columns.numel()
    copy = torch.empty(tokens, n_columns, dtype=x.dtype, device=x.device)
    if copy.numel():
        grid = triton.cdiv(tokens, _BLOCK_TOKENS), triton.cdiv(n_columns, _BLOCK_COLUMNS)
        with torch.cuda.device_of(x):
            columns_kernel[grid](
                x, columns, copy, tokens, n_columns, x.stride(0),
                BLOCK_TOKENS=_BLOCK_TOKENS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
    return copy
