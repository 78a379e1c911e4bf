"""`force`: how much the loss would rise, in first order, when a weight is taken away."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, WEIGHT, Statistics


@needs(GRADIENT, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """-w_ij g_ij, with g the loss gradient summed over the sample: (rows, in_features) float32, of either sign.

    FORCE (de Jorge et al., ICLR 2021). The sign counts, as in the code of Liu et al., ACL 2025 (``skeletonization``):
    selected are the largest values of -w g, not of its size.
    """
    return (statistics.weight * statistics.gradient).neg_()
