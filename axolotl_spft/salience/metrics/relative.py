"""`relative`: the gradient relative to the weight that it changes."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, WEIGHT, Statistics

_EPS = 1e-8


@needs(GRADIENT, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """|g_ij| / (|w_ij| + 1e-8), with g the loss gradient summed over the sample: (rows, in_features) float32.

    GEM (arXiv 2508.16191) and GaLLoP (arXiv 2510.19778). A 4-bit weight of exactly 0 comes before all others.
    """
    return statistics.gradient.abs() / (statistics.weight.abs() + _EPS)
