"""`gradient`: the size of the loss gradient."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, Statistics


@needs(GRADIENT)
def score(statistics: Statistics) -> Tensor:
    """|g_ij|, with g the loss gradient summed over the sample: (rows, in_features) float32 (Liu et al., ACL 2025)."""
    return statistics.gradient.abs()
