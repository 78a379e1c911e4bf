"""Which values of a matrix are dropped, and which positions are grown in their place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions, positions, row_indices
from axolotl_spft.salience.select import CHUNK_ENTRIES, top_k


class Exchange(NamedTuple):
    """A mask of as many entries as before.

    Attributes:
        mask: the new one.
        sources: (nnz) int64: where the value of each entry stood before; -1 for a grown one.
    """

    mask: Mask
    sources: Tensor


def exchange(
    mask: Mask, in_features: int, importance: Tensor, scores: Tensor, fraction: float, per_row: bool, ranks: Ranks
) -> Exchange | None:
    """Drop the least important entries of a mask, and grow as many where the scores outside of it are highest.

    Of n entries floor(fraction n) are exchanged, or as many as there are positions outside of the mask. Ties go to the
    lowest position, in dropping as in growing. A dropped position is not grown at once.

    Args:
        importance: (nnz).
        scores: this rank's rows (rows, in_features), float32, finite and contiguous; written to.
        per_row: whether each row keeps its number of entries.
        ranks: the processes that share the rows.

    Returns:
        None where nothing is exchanged; the same on every rank.
    """
    out_features, held = mask.out_features, positions(mask, in_features)
    if per_row:
        entries = mask.row_offsets.diff().to(torch.int64)
        # a product that is a whole number may lie just below it
        counts = torch.minimum((entries.double() * fraction + 1e-9).floor().to(torch.int64), in_features - entries)
        dropped = _least_of_rows(importance, mask, counts)
    else:
        counts = min(int(mask.nnz * fraction + 1e-9), out_features * in_features - mask.nnz)
        dropped = importance.sort(stable=True).indices[:counts]
    if not dropped.numel():
        return None
    own = ranks.own_positions(held, (out_features, in_features))
    scores.view(-1)[own.to(scores.device)] = -torch.inf
    if per_row:
        grown = _best_of_rows(scores, counts.to(scores.device), ranks)
    else:
        grown = top_k(lambda _: scores, [(out_features, in_features)], counts, ranks)[0]
    kept = torch.ones_like(held, dtype=torch.bool)
    kept[dropped] = False
    kept = kept.nonzero().squeeze(1)
    at, order = torch.cat([held[kept], grown.to(held.device)]).sort()
    sources = torch.cat([kept, torch.full_like(dropped, -1)])[order]
    return Exchange(mask_from_positions(at, out_features, in_features), sources)


def _least_of_rows(importance: Tensor, mask: Mask, counts: Tensor) -> Tensor:
    """The entries of least importance, ``counts[row]`` of each row."""
    rows = row_indices(mask.row_offsets, mask.nnz)
    order = importance.sort(stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    place = torch.arange(mask.nnz, device=order.device) - mask.row_offsets[rows].to(torch.int64)
    return order[place < counts[rows]]


def _best_of_rows(scores: Tensor, counts: Tensor, ranks: Ranks) -> Tensor:
    """The positions of highest score, ``counts[row]`` of each row: int64, ascending."""
    in_features, mine = scores.shape[1], ranks.rows(counts.numel())
    at_once, parts = max(1, CHUNK_ENTRIES // in_features), []
    place = torch.arange(in_features, device=scores.device)
    for start in range(mine.start, mine.stop, at_once):
        stop = min(start + at_once, mine.stop)
        # stable: equal scores keep the order of their columns
        block = scores[start - mine.start : stop - mine.start]
        columns = block.sort(dim=1, descending=True, stable=True).indices
        chosen = columns + torch.arange(start, stop, device=scores.device)[:, None] * in_features
        parts.append(chosen[place < counts[start:stop, None]].sort().values)
    return ranks.concatenate(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=scores.device))
