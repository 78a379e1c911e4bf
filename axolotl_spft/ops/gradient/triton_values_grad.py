"""Triton kernel of the values' gradient: dV = (dY[:, rows]^T X[:, columns])[mask], only the tiles that hold entries.

One program computes one tile in registers and stores its entries, and no others, where they belong in dV. The store is
masked by one bit per element of the tile, and running sums of the bits say which entry of the tile an element is: that
takes 512 bytes for a tile of 64 x 64 where a map of slots would take 16 KiB, and unlike a gather from a register tile,
or through scratch memory and a barrier, it costs the same however full the tile is and needs only standard operations.

The rows of dY are copied beforehand: asynchronous copies, without which a GPU's matrix units wait for memory, take 4
bytes at least, so a kernel that picks 16-bit numbers one by one out of dY has none; and it would pick again for each
tile in a row of tiles.
"""

from __future__ import annotations

import functools
import inspect

import torch
import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.backends.dispatch import blocks, interpreting
from axolotl_spft.ops.backends.launch import launching_on
from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.mask.tiles import Tiles

# so many programs for each multiprocessor keep the GPU busy; fewer tiles than that are split along the tokens
_PROGRAMS_PER_PROCESSOR = 4
_MIN_TOKENS_PER_SPLIT = 512
_MAX_SPLITS = 16

# only what leaves the order of the sums alone: a gradient must not depend on which configuration was fastest
_CONFIGS = [
    triton.Config({"BLOCK_TOKENS": block_tokens}, num_warps=4, num_stages=stages)
    for block_tokens, stages in ((64, 3), (32, 4), (64, 4), (128, 3))
]
# results of tuning last across processes where this triton can keep them
_KEEP = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}


@triton.autotune(configs=_CONFIGS[:1] if interpreting() else _CONFIGS, key=["token_class", "grid_class"], **_KEEP)
@triton.jit
def tiles_kernel(
    grad_rows,
    x,
    tile_rows,
    tile_columns,
    offsets,
    slots,
    words,
    grads,
    tokens,
    tokens_per_split,
    grad_rows_stride,
    x_stride,
    n_columns,
    nnz,
    token_class,
    grid_class,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """grads[split, slots] = dY^T X over the split's tokens, at the entries of one tile.

    ``grad_rows`` (tokens, rows of the tiles), ``x`` (tokens, n_columns), ``grads`` (splits, nnz); the other pointers
    are fields of `Tiles`.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    i = tl.arange(0, BLOCK_ROWS)
    j = tl.arange(0, BLOCK_COLUMNS)
    row = tl.load(tile_rows + tile) * BLOCK_ROWS + i
    column = tl.load(tile_columns + tile) * BLOCK_COLUMNS + j
    column_exists = column < n_columns

    first = split * tokens_per_split
    stop = tl.minimum(first + tokens_per_split, tokens)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first, stop, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        token_exists = token < stop
        token = token.to(tl.int64)
        a_at = token[None, :] * grad_rows_stride + row[:, None]
        b_at = token[:, None] * x_stride + column[None, :]
        a = tl.load(grad_rows + a_at, mask=token_exists[None, :], other=0.0)
        b = tl.load(x + b_at, mask=token_exists[:, None] & column_exists[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    word = tl.load(words + tile.to(tl.int64) * BLOCK_ROWS + i)
    held = ((word[:, None] >> j[None, :].to(tl.int64)) & 1).to(tl.int32)
    per_row = tl.sum(held, axis=1)
    rank = (tl.cumsum(per_row, axis=0) - per_row)[:, None] + tl.cumsum(held, axis=1) - held
    is_entry = held != 0
    slot = tl.load(slots + tl.load(offsets + tile) + rank, mask=is_entry, other=0)
    target = grads + split.to(tl.int64) * nnz + slot
    tl.store(target, sums.to(grads.dtype.element_ty), mask=is_entry)


def tiles_values_grad(
    grad_y: Tensor, kept: Tensor, tiles: Tiles, dtype: torch.dtype | None = None, splits: int | None = None
) -> Tensor:
    """dV from the tiles that hold entries; sums are float32, their order does not vary from run to run.

    Args:
        grad_y: dY, (tokens, out_features), contiguous.
        kept: X[:, plan.columns], (tokens, columns), contiguous, in the dtype of ``grad_y``.
        dtype: of the result; by default that of ``grad_y``.
        splits: into how many parts the tokens are cut; chosen from the number of tiles by default.

    Returns:
        (nnz) in ``dtype``.
    """
    tokens, nnz, dtype = grad_y.shape[0], tiles.slots.numel(), dtype or grad_y.dtype
    if not tokens:
        return grad_y.new_zeros(nnz, dtype=dtype)
    if splits is None:
        splits = _splits(tiles.count, tokens, grad_y.device)
    x = select_columns(kept, tiles.columns, backend="triton")
    grad_rows = select_columns(grad_y, tiles.rows, backend="triton")
    grads = torch.empty(splits, nnz, dtype=dtype if splits == 1 else torch.float32, device=grad_y.device)
    with launching_on(grad_y.device):
        tiles_kernel[(tiles.count, splits)](
            grad_rows,
            x,
            tiles.tile_rows,
            tiles.tile_columns,
            tiles.offsets,
            tiles.slots,
            tiles.words,
            grads,
            tokens,
            blocks(tokens, splits),
            grad_rows.stride(0),
            x.stride(0),
            x.shape[1],
            nnz,
            # tuned anew where these change by a power of two: batches differ in tokens, layers in tiles
            tokens.bit_length(),
            (tiles.count * splits).bit_length(),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_COLUMNS=tiles.block_columns,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        )
    return grads[0] if splits == 1 else grads.sum(0).to(dtype)


def _splits(tiles: int, tokens: int, device: torch.device) -> int:
    wanted = _programs(device) // tiles
    return max(1, min(wanted, tokens // _MIN_TOKENS_PER_SPLIT, _MAX_SPLITS))


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
