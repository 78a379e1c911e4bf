"""`taylor_fo`: the square of the first-order change of the loss when a weight is taken away."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, WEIGHT, Statistics


@needs(GRADIENT, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """(w_ij g_ij)^2, with g the loss gradient summed over the sample: (rows, in_features) float32.

    Taylor-FO (Molchanov et al., CVPR 2019). The order is that of `snip`, up to squares too small for float32.
    """
    return (statistics.weight * statistics.gradient).square_()
