"""Selection of whole blocks.

A matrix (out_features, in_features) is cut into blocks of (rows, columns) from its first entry on; those at the lower
and right edge may be smaller. Blocks are numbered row of blocks by row of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.salience.select import Shape

_ONE_PROCESS = Ranks()


def block_scores(scores: Tensor, shape: Shape, block: Shape, ranks: Ranks = _ONE_PROCESS) -> Tensor:
    """The sum of the scores in each block: (blocks down, blocks across) float32, the same on every rank.

    Added in float64, in which the order of so few float32 numbers hardly ever shows.

    Args:
        scores: this rank's rows (rows, in_features), float32.
        shape: (out_features, in_features) of the matrix.
        block: (rows, columns) of a block.
        ranks: the processes that share the matrix' rows.
    """
    down, across = _grid(shape, block)
    mine = ranks.rows(shape[0])
    sums = torch.zeros((down, across), dtype=torch.float64, device=scores.device)
    columns = torch.arange(shape[1], device=scores.device) // block[1]
    first = mine.start
    while first < mine.stop:
        # to the end of a row of blocks, so that no more than that is held in float64
        stop = min((first // block[0] + 1) * block[0], mine.stop)
        column_sums = scores[first - mine.start : stop - mine.start].to(torch.float64).sum(0)
        sums[first // block[0]].index_add_(0, columns, column_sums)
        first = stop
    return ranks.sum_(sums).to(torch.float32)


def block_entries(shape: Shape, block: Shape) -> Tensor:
    """How many entries each block has: (blocks down, blocks across) int64."""
    sides = [
        torch.full((number,), length).clamp_max(size - torch.arange(number) * length)
        for number, length, size in zip(_grid(shape, block), block, shape)
    ]
    return sides[0][:, None] * sides[1]


def top_blocks(sums: Tensor, shape: Shape, block: Shape, k: int) -> Tensor:
    """The positions of the entries of the highest blocks that together have at most ``k``: int64, ascending.

    Blocks are taken from the highest score on, ties from the lowest number, while the next one fits.

    Args:
        sums: of `block_scores`.
        shape: (out_features, in_features) of the matrix.
        block: (rows, columns) of a block.
        k: how many entries there may be.
    """
    order = sums.cpu().view(-1).sort(descending=True, stable=True).indices
    held = block_entries(shape, block).view(-1)[order].cumsum(0)
    chosen = torch.zeros(sums.numel(), dtype=torch.bool)
    chosen[order[: int(torch.searchsorted(held, k, right=True))]] = True
    parts = []
    for number in chosen.view(sums.shape).any(1).nonzero().squeeze(1).tolist():
        across = chosen.view(sums.shape)[number].repeat_interleave(block[1])[: shape[1]].nonzero().squeeze(1)
        rows = torch.arange(number * block[0], min((number + 1) * block[0], shape[0]))
        parts.append((rows[:, None] * shape[1] + across).view(-1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def is_of_blocks(mask: Mask, shape: Shape, block: Shape) -> bool:
    """Whether a mask of a matrix of this shape is made of whole blocks."""
    at = positions(mask, shape[1])
    number = at // shape[1] // block[0] * _grid(shape, block)[1] + at % shape[1] // block[1]
    whole = block_entries(shape, block).view(-1)
    held = torch.bincount(number.cpu(), minlength=len(whole))
    return bool(((held == 0) | (held == whole)).all())


def _grid(shape: Shape, block: Shape) -> Shape:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
