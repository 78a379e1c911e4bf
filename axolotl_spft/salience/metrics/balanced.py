"""`balanced`: the gradient against those of its row and its column."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, Statistics


@needs(GRADIENT)
def score(statistics: Statistics) -> Tensor:
    """|g_ij| / sqrt(rms(g_i.) rms(g_.j)): spreads the mask over rows and columns. Zero rows and columns score 0.

    (rows, in_features) float32. Its square is Adam's own order of first-order gains, |g| |g| / sqrt(E g^2), with E g^2
    factored into rows and columns.
    """
    gradient = statistics.gradient
    row_rms, column_rms = rms_of_rows_and_columns(statistics)
    scale = row_rms.sqrt() * column_rms.sqrt()
    return torch.where(scale > 0, gradient.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def rms_of_rows_and_columns(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """The root mean squares of the gradient in each of these rows (rows, 1) and each whole column (in_features)."""
    squares = statistics.gradient.square()
    return squares.mean(1, keepdim=True).sqrt(), (statistics.sum_over_rows(squares) / statistics.shape[0]).sqrt()
