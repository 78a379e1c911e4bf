"""How a global top-k falls on matrices that each have a fewest and a most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.select import sort_keys

_ONE_PROCESS = Ranks()
_DIGIT_BITS, _DIGITS = 8, 4
_BINS = 2**_DIGIT_BITS


def bounded_counts(
    score_of: Callable[[int], Tensor],
    fewest: Sequence[int],
    most: Sequence[int],
    k: int,
    ranks: Ranks = _ONE_PROCESS,
    weight_of: Callable[[int], Tensor] | None = None,
) -> list[int]:
    """How many entries of each matrix belong to the k that maximize the sum of scores within the bounds.

    Every matrix first gets its ``fewest`` highest scores; then the highest of what is left anywhere are taken, except
    in matrices that have their ``most``; ties go to the lowest matrix. With N_i(t) the number of scores of matrix i of
    at least t, the counts are clamp(N_i(t), fewest_i, most_i) for the t at which these add up to k. t is found digit
    by digit, so that each matrix is looked at four times.

    Args:
        score_of: gives this rank's rows of the scores of the matrix of an index, float32 and finite.
        fewest, most: of each matrix, with sum(fewest) <= k <= sum(most), and no more than its entries.
        k: how many entries are selected in all.
        ranks: the processes that share the matrices' rows.
        weight_of: how many entries each score of a matrix stands for (int64, of its scores' shape); 1 by default.
    """
    lowest, highest = torch.tensor(fewest, dtype=torch.int64), torch.tensor(most, dtype=torch.int64)
    above = torch.zeros(len(fewest), dtype=torch.int64)
    prefix, equal = 0, above
    for digit in reversed(range(_DIGITS)):
        # (matrices, bins): how many scores whose key begins with the prefix have each next digit
        counts = ranks.sum_(_histograms(score_of, len(fewest), weight_of, prefix, digit))
        # of at least each digit
        reached = above[:, None] + counts.flip(1).cumsum(1).flip(1)
        totals = reached.clamp(lowest[:, None], highest[:, None]).sum(0)
        found = int((totals >= k).nonzero()[-1])
        above, equal = reached[:, found] - counts[:, found], counts[:, found]
        prefix = (prefix << _DIGIT_BITS) | found
    counts = above.clamp(lowest, highest)
    room = (above + equal).clamp(lowest, highest) - counts
    before = room.cumsum(0) - room
    return (counts + torch.minimum(room, (k - int(counts.sum()) - before).clamp_min(0))).tolist()


def _histograms(
    score_of: Callable[[int], Tensor],
    count: int,
    weight_of: Callable[[int], Tensor] | None,
    prefix: int,
    digit: int,
) -> Tensor:
    histograms = torch.zeros((count, _BINS), dtype=torch.int64)
    shift = digit * _DIGIT_BITS
    for index in range(count):
        start, weights = 0, None if weight_of is None else weight_of(index).view(-1)
        for keys in sort_keys(score_of(index)):
            # from 0, so that every digit is at least 0
            keys = keys.to(torch.int64) + 2**31
            inside = (keys >> (shift + _DIGIT_BITS)) == prefix
            digits = (keys[inside] >> shift) & (_BINS - 1)
            if weights is None:
                found = torch.bincount(digits, minlength=_BINS)
            else:
                found = torch.zeros(_BINS, dtype=torch.int64, device=keys.device)
                found.index_add_(0, digits, weights[start : start + keys.numel()].to(keys.device)[inside])
            histograms[index] += found.cpu()
            start += keys.numel()
    return histograms
