"""Exact top-k selection with ties broken by the lowest (matrix, position), without one big sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks

Shape = tuple[int, int]
_ONE_PROCESS = Ranks()

# entries that are looked at together: bounds the temporaries to some 200 MB
CHUNK_ENTRIES = 2**24


def top_k(
    score_of: Callable[[int], Tensor], shapes: Sequence[Shape], k: int, ranks: Ranks = _ONE_PROCESS
) -> list[Tensor]:
    """The positions of the ``k`` highest scores over several matrices together.

    The k-th highest score is found from two histograms over the halves of the float's bits, turned so that they order
    like the scores themselves; so each matrix is looked at four times and nothing is sorted.

    Args:
        score_of: gives this rank's rows of the score matrix of an index (rows, in_features), float32 and finite, of
            any sign.
        shapes: (out_features, in_features) of each matrix.
        k: how many positions are selected, at most the number of entries.
        ranks: the processes that share the matrices' rows.

    Returns:
        For each matrix its positions, row * in_features + column: int64, ascending; the same on every rank.
    """
    if k == 0:
        return [torch.empty(0, dtype=torch.int64) for _ in shapes]
    count = len(shapes)
    high, above = _histogram_bin(score_of, count, k, lambda bits: (bits >> 16) + 2**15, 2**16, ranks)
    high -= 2**15
    low, above_low = _histogram_bin(
        score_of, count, k - above, lambda bits: bits[(bits >> 16) == high] & 0xFFFF, 2**16, ranks
    )
    threshold = (high << 16) | low
    ties = _ties_of_this_rank(score_of, count, threshold, k - above - above_low, ranks)
    selected = []
    for index, (out_features, in_features) in enumerate(shapes):
        parts, offset, ties_left = [], ranks.rows(out_features).start * in_features, ties[index]
        for bits in _chunks(score_of(index)):
            chosen = bits > threshold
            equal = (bits == threshold).nonzero().squeeze(1)[:ties_left]
            ties_left -= equal.numel()
            chosen[equal] = True
            parts.append(chosen.nonzero().squeeze(1).add_(offset))
            offset += bits.numel()
        selected.append(ranks.concatenate(torch.cat(parts)))
    return selected


def _ties_of_this_rank(
    score_of: Callable[[int], Tensor], count: int, threshold: int, ties: int, ranks: Ranks
) -> Tensor:
    """How many of the first ``ties`` entries at the threshold lie in this rank's rows of each matrix."""
    mine = torch.tensor([sum(int((bits == threshold).sum()) for bits in _chunks(score_of(i))) for i in range(count)])
    # in the order of positions: matrix by matrix, and in each the ranks' rows
    each = ranks.gather_numbers(mine).t().reshape(-1)
    before = each.cumsum(0) - each
    return torch.minimum(each, (ties - before).clamp_min(0)).view(count, ranks.world)[:, ranks.rank].tolist()


def _chunks(scores: Tensor) -> Iterator[Tensor]:
    for part in scores.to(torch.float32).contiguous().view(-1).split(CHUNK_ENTRIES):
        # adding 0 turns -0.0 into 0.0, which is equal to it
        bits = (part + 0.0).view(torch.int32)
        # the bits of negative numbers ascend as these fall: all but the sign are flipped
        yield torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _histogram_bin(
    score_of: Callable[[int], Tensor],
    count: int,
    k: int,
    key: Callable[[Tensor], Tensor],
    bins: int,
    ranks: Ranks,
) -> tuple[int, int]:
    """The bin that holds the k-th highest key, and how many keys lie in the bins above it."""
    histogram = torch.zeros(bins, dtype=torch.int64)
    for index in range(count):
        for bits in _chunks(score_of(index)):
            histogram += torch.bincount(key(bits), minlength=bins).cpu()
    reached = ranks.sum_(histogram).flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k))
    above = int(reached[place - 1]) if place else 0
    return bins - 1 - place, above


def top_k_per_row(scores: Tensor, shape: Shape, k: int, ranks: Ranks = _ONE_PROCESS) -> Tensor:
    """The positions of ``k`` entries spread evenly over the rows of one matrix.

    Every row gets its k // out_features highest entries; the rest go to the rows whose next entry is highest.

    Args:
        scores: this rank's rows (rows, in_features), float32 and finite, of any sign.
        shape: (out_features, in_features) of the matrix.
        ranks: the processes that share the matrix' rows.

    Returns:
        (k) int64, ascending; the same on every rank.
    """
    out_features, in_features = shape
    quota, rest = divmod(k, out_features)
    rows_at_once = max(1, CHUNK_ENTRIES // in_features)
    wanted = min(quota + (rest > 0), in_features)
    columns, next_score = [], []
    for block in scores.split(rows_at_once):
        # stable: equal scores keep the order of their columns
        ordered = block.sort(dim=1, descending=True, stable=True)
        columns.append(ordered.indices[:, :wanted].clone())
        next_score.append(ordered.values[:, wanted - 1].clone())
    columns, mine = torch.cat(columns), ranks.rows(out_features)
    positions = columns + torch.arange(mine.start, mine.stop, device=scores.device)[:, None] * in_features
    chosen = positions[:, :quota].reshape(-1)
    if rest:
        rows = ranks.concatenate(torch.cat(next_score)).sort(descending=True, stable=True).indices[:rest]
        rows = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
        chosen = torch.cat([chosen, positions[rows, quota]])
    return ranks.concatenate(chosen.sort().values)
