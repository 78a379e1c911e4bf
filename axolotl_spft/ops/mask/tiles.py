"""The tiles of the compact rows x columns product that hold entries.

Rows and columns with many entries come first, so that the entries of a mask by gradient, whose rows and columns differ
much in how many they hold, gather in few tiles. Symbols: ``tiles`` is how many tiles hold an entry; a tile is
block_rows x block_columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from axolotl_spft.ops.mask.csr import Mask, row_indices
from axolotl_spft.ops.mask.plan import Plan, column_ranks, padded

# one bit per column of a tile fits a 64-bit word
BLOCK_ROWS = BLOCK_COLUMNS = 64
# above this share of the rows x columns product one large product takes no longer: for as many multiplications (bf16,
# 4,096 tokens) an H100 takes 0.22 of the time that the tiles' kernel takes
TILES_UP_TO = 0.2


class Tiles(NamedTuple):
    """Where the entries stand in the tiles.

    Attributes:
        rows: the plan's rows in the order of the tiles, int64; some again at the end, to fill the last tiles.
        columns: for each column in the order of the tiles its index into the plan's columns, int64; filled likewise.
        tile_rows, tile_columns: (tiles; int32) index of each tile's first row and column, in blocks.
        offsets: (tiles + 1; int32) the entries of tile t are those from ``offsets[t]`` to ``offsets[t + 1]``.
        slots: (nnz; int32) index into the values of each entry, tile by tile, row by row inside a tile.
        words: (tiles, block_rows; int64) bit j of word i says whether the tile's element (i, j) is an entry.
        block_columns: width of a tile.
    """

    rows: Tensor
    columns: Tensor
    tile_rows: Tensor
    tile_columns: Tensor
    offsets: Tensor
    slots: Tensor
    words: Tensor
    block_columns: int

    @property
    def count(self) -> int:
        return self.tile_rows.numel()

    @property
    def block_rows(self) -> int:
        return self.words.shape[1]

    def share(self, plan: Plan) -> float:
        """The tiles' area over that of the rows x columns product; above 1 where they overhang it."""
        return self.count * self.block_rows * self.block_columns / (plan.n_rows * plan.n_columns)


def make_tiles(mask: Mask, plan: Plan, block_rows: int = BLOCK_ROWS, block_columns: int = BLOCK_COLUMNS) -> Tiles:
    """The tiles of a mask and its plan; both block sizes are powers of two, ``block_columns`` at most 64."""
    row_ranks, ranks = _ranks(mask, plan)
    row_order, row_places = _by_count(row_ranks, plan.n_rows)
    column_order, column_places = _by_count(ranks, plan.n_columns)
    bands = -(-plan.n_columns // block_columns)
    tile = row_places // block_rows * bands + column_places // block_columns
    row, column = row_places % block_rows, column_places % block_columns
    slots = ((tile * block_rows + row) * block_columns + column).argsort()
    numbers, which, counts = tile[slots].unique_consecutive(return_inverse=True, return_counts=True)
    words = torch.zeros(numbers.numel() * block_rows, dtype=torch.int64, device=tile.device)
    # a sum of distinct powers of two sets their bits, the sign bit too
    words.scatter_add_(0, which * block_rows + row[slots], torch.ones_like(column) << column[slots])
    offsets = torch.zeros(numbers.numel() + 1, dtype=torch.int32, device=tile.device)
    offsets[1:] = counts.cumsum(0)
    return Tiles(
        padded(row_order if plan.rows is None else plan.rows[row_order].to(torch.int64), block_rows),
        padded(column_order, block_columns),
        (numbers // bands).to(torch.int32),
        (numbers % bands).to(torch.int32),
        offsets,
        slots.to(torch.int32),
        words.view(-1, block_rows),
        block_columns,
    )


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def tiles_of(mask: Mask, plan: Plan) -> Tiles | None:
    """The tiles of a mask and its plan where they are few enough to pay; kept as long as the plan's tensors are."""
    # by storage: a compiled graph hands over the same memory in tensors of its own
    key = plan.offsets.untyped_storage()
    if key not in _kept:
        if plan.offsets.is_cuda and torch.cuda.is_current_stream_capturing():
            # making them waits for the device, which a capture forbids
            return None
        tiles = make_tiles(mask, plan)
        _kept[key] = tiles if tiles.share(plan) <= TILES_UP_TO else None
    return _kept[key]


def product_by_tiles(grad_y: Tensor, kept: Tensor, tiles: Tiles) -> Tensor:
    """dV = (dY[:, rows]^T X[:, columns])[mask] tile by tile in plain torch: what the kernel is compared with.

    Args:
        grad_y: dY, (tokens, out_features).
        kept: X[:, plan.columns], (tokens, columns).

    Returns:
        (nnz) in the dtype of ``grad_y``.
    """
    ordered = kept[:, tiles.columns]
    grads = grad_y.new_empty(tiles.slots.numel())
    bits = torch.arange(tiles.block_columns, device=grad_y.device)
    for tile in range(tiles.count):
        row, column = tiles.tile_rows[tile] * tiles.block_rows, tiles.tile_columns[tile] * tiles.block_columns
        rows = tiles.rows[row : row + tiles.block_rows]
        product = grad_y[:, rows].t() @ ordered[:, column : column + tiles.block_columns]
        held = ((tiles.words[tile, :, None] >> bits) & 1).bool()[: product.shape[0], : product.shape[1]]
        grads[tiles.slots[tiles.offsets[tile] : tiles.offsets[tile + 1]].to(torch.int64)] = product[held]
    return grads


def _ranks(mask: Mask, plan: Plan) -> tuple[Tensor, Tensor]:
    """The index into the plan's rows and columns of each entry: (nnz; int64) each."""
    rows = row_indices(plan.offsets, mask.nnz)
    return rows.to(torch.int64), column_ranks(plan, mask.columns).to(torch.int64)


def _by_count(ranks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The order of 0..size-1 that puts what occurs most often in ``ranks`` first, and each rank's place in it."""
    order = torch.bincount(ranks, minlength=size).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(size, device=order.device)
    return order, places[ranks]
