"""Exact top-k selection with ties broken by the lowest (matrix, position), without one big sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# entries that are looked at together: bounds the temporaries to some 200 MB
CHUNK_ENTRIES = 2**24


def top_k(score_of: Callable[[int], Tensor], count: int, k: int) -> list[Tensor]:
    """The positions of the ``k`` highest scores over ``count`` matrices together.

    The k-th highest score is found from two histograms over the halves of the float's bits, which for scores of at
    least 0 order like the scores themselves; so each matrix is looked at three times and nothing is sorted.

    Args:
        score_of: gives the score matrix of an index (out_features, in_features), float32, at least 0 and finite.
        count: how many matrices there are.
        k: how many positions are selected, at most the number of entries.

    Returns:
        For each matrix its positions, row * in_features + column: int64, ascending.
    """
    if k == 0:
        return [torch.empty(0, dtype=torch.int64) for _ in range(count)]
    high, above = _histogram_bin(score_of, count, k, lambda bits: bits >> 16, 2**15)
    low, above_low = _histogram_bin(score_of, count, k - above, lambda bits: bits[(bits >> 16) == high] & 0xFFFF, 2**16)
    threshold = (high << 16) | low
    ties_left = k - above - above_low
    selected = []
    for index in range(count):
        parts, offset = [], 0
        for bits in _chunks(score_of(index)):
            chosen = bits > threshold
            ties = (bits == threshold).nonzero().squeeze(1)[:ties_left]
            ties_left -= ties.numel()
            chosen[ties] = True
            parts.append(chosen.nonzero().squeeze(1).add_(offset))
            offset += bits.numel()
        selected.append(torch.cat(parts))
    return selected


def _chunks(scores: Tensor) -> Iterator[Tensor]:
    # adding 0 turns -0.0 into 0.0, whose bits are those of the smallest score
    yield from (scores.contiguous().view(-1) + 0.0).view(torch.int32).split(CHUNK_ENTRIES)


def _histogram_bin(
    score_of: Callable[[int], Tensor], count: int, k: int, key: Callable[[Tensor], Tensor], bins: int
) -> tuple[int, int]:
    """The bin that holds the k-th highest key, and how many keys lie in the bins above it."""
    histogram = torch.zeros(bins, dtype=torch.int64)
    for index in range(count):
        for bits in _chunks(score_of(index)):
            histogram += torch.bincount(key(bits), minlength=bins).cpu()
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k))
    above = int(reached[place - 1]) if place else 0
    return bins - 1 - place, above


def top_k_per_row(scores: Tensor, k: int) -> Tensor:
    """The positions of ``k`` entries spread evenly over the rows of one matrix.

    Every row gets its k // out_features highest entries; the rest go to the rows whose next entry is highest.

    Args:
        scores: (out_features, in_features), float32, at least 0.

    Returns:
        (k) int64, ascending.
    """
    out_features, in_features = scores.shape
    quota, rest = divmod(k, out_features)
    rows_at_once = max(1, CHUNK_ENTRIES // in_features)
    wanted = min(quota + (rest > 0), in_features)
    columns, next_score = [], []
    for block in scores.split(rows_at_once):
        # stable: equal scores keep the order of their columns
        ordered = block.sort(dim=1, descending=True, stable=True)
        columns.append(ordered.indices[:, :wanted].clone())
        next_score.append(ordered.values[:, wanted - 1].clone())
    columns = torch.cat(columns)
    positions = columns + torch.arange(out_features, device=scores.device)[:, None] * in_features
    chosen = positions[:, :quota].reshape(-1)
    if rest:
        rows = torch.cat(next_score).sort(descending=True, stable=True).indices[:rest]
        chosen = torch.cat([chosen, positions[rows, quota]])
    return chosen.sort().values
