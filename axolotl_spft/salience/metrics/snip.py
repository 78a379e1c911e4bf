"""`snip`: how much the loss changes, in first order, when a weight is taken away."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, WEIGHT, Statistics


@needs(GRADIENT, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """|w_ij g_ij|, with g the loss gradient summed over the sample: (rows, in_features) float32.

    SNIP (Lee et al., ICLR 2019), the ``saliency`` of Liu et al., ACL 2025.
    """
    return (statistics.weight * statistics.gradient).abs_()
