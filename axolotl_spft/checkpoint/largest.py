"""The k largest magnitudes of many tensors that are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_BINS = 2**16


class Threshold(NamedTuple):
    """Taken are all magnitudes above ``bits``, and of those equal to it the first ``ties``."""

    bits: int
    ties: int


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values| in float32 as int32, which are in the order of the magnitudes."""
    return values.abs().float().contiguous().view(torch.int32)


def threshold(stream: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    """The threshold of the ``count`` largest magnitudes other than 0; ``stream`` gives the tensors twice.

    The upper halves of the bits say in which bin the last of them lies, the lower halves which one it is.
    """
    total = torch.zeros(_BINS, dtype=torch.int64)
    for values in stream():
        bits = magnitude_bits(values)
        total += torch.bincount((bits[bits > 0] >> 16).flatten(), minlength=_BINS)
    upper, left = _bin_of(total, count)
    if upper is None:
        return Threshold(0, 0)
    inside = torch.zeros(_BINS, dtype=torch.int64)
    for values in stream():
        bits = magnitude_bits(values)
        chosen = bits[(bits > 0) & ((bits >> 16) == upper)]
        inside += torch.bincount((chosen & (_BINS - 1)).flatten(), minlength=_BINS)
    lower, ties = _bin_of(inside, left)
    return Threshold((upper << 16) | lower, ties)


def threshold_of(values: Tensor, count: int) -> Threshold:
    """The threshold of the ``count`` largest magnitudes of one tensor."""
    return threshold(lambda: [values], count)


def _bin_of(counts: Tensor, count: int) -> tuple[int | None, int]:
    """The bin that the ``count``-th largest lies in, and how many are wanted of it; None if there are fewer."""
    from_above = counts.flip(0).cumsum(0)
    if count > int(from_above[-1]):
        return None, 0
    place = int(torch.searchsorted(from_above, count))
    before = int(from_above[place - 1]) if place else 0
    return _BINS - 1 - place, count - before


def taken(values: Tensor, limit: Threshold) -> tuple[Tensor, Threshold]:
    """The positions (ascending, int64) that ``limit`` takes of flattened ``values``, and what is left of it."""
    bits = magnitude_bits(values).flatten()
    chosen = bits > limit.bits
    if limit.ties:
        equal = (bits == limit.bits).nonzero().squeeze(1)[: limit.ties]
        chosen[equal] = True
        limit = limit._replace(ties=limit.ties - len(equal))
    return chosen.nonzero().squeeze(1), limit
