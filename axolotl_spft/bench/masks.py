"""Masks that are drawn rather than computed: random weights have no meaningful gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions

# the chance of a row or column to hold an entry falls with its rank like rank^-0.5: a head that holds most entries, and
# a long tail of rows and columns with a few each
_SKEW = 0.5


def draw_mask(
    out_features: int,
    in_features: int,
    nnz: int,
    row_share: float,
    column_share: float,
    generator: torch.Generator,
    among: Tensor | None = None,
) -> Mask:
    """A random mask with a given concentration.

    R = row_share * out_features rows and C = column_share * in_features columns are used, both rounded, at least 1 and
    at most ``nnz``. Every one of them holds an entry; the other nnz - max(R, C) entries fall on the R x C places with a
    chance that falls with the ranks of the row and of the column.

    Args:
        generator: on the device where the mask is wanted.
        among: (at least C; int64) the columns that may be used; by default all.

    Raises:
        SpftError: the used rows and columns have fewer than ``nnz`` places.
    """
    rows = min(nnz, max(1, round(row_share * out_features)))
    columns = min(nnz, max(1, round(column_share * in_features)))
    if nnz > rows * columns:
        raise SpftError(
            f"{nnz:,} entries do not fit on {rows:,} rows x {columns:,} columns of a {out_features} x {in_features} "
            "matrix: ask for a larger area or a lower density"
        )
    device = generator.device
    row_of = torch.randperm(out_features, generator=generator, device=device)[:rows]
    candidates = in_features if among is None else among.numel()
    column_of = torch.randperm(candidates, generator=generator, device=device)[:columns]
    if among is not None:
        column_of = among[column_of]
    # Gumbel keys: the largest are a draw without replacement in proportion to rank^-skew
    keys = torch.empty(rows, columns, device=device).exponential_(generator=generator).log_().neg_()
    keys -= _SKEW * torch.arange(1, rows + 1, device=device).log()[:, None]
    keys -= _SKEW * torch.arange(1, columns + 1, device=device).log()
    each = torch.arange(max(rows, columns), device=device)
    # these come first, even before a draw of 0
    keys.clamp_max_(torch.finfo(keys.dtype).max)
    keys[each % rows, each % columns] = torch.inf
    chosen = keys.view(-1).topk(nnz, sorted=False).indices
    at = row_of[chosen // columns] * in_features + column_of[chosen % columns]
    return mask_from_positions(at.sort().values, out_features, in_features)


def pool_share(column_shares: Sequence[float], union: float) -> float:
    """The share P of an input's columns among which layers that read it choose theirs, to use ``union`` of them all.

    With c of the columns for each layer, chosen at random among the same P, the layers use P (1 - prod(1 - c / P)) of
    them together, which grows with P from max(c) to what layers use that know nothing of each other. A ``union``
    outside of that gives the nearer end.
    """
    low, high = max(column_shares), 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if middle * (1 - math.prod(1 - share / middle for share in column_shares)) < union:
            low = middle
        else:
            high = middle
    return high
