"""`fisher`: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import SQUARED_GRADIENT, Statistics


@needs(SQUARED_GRADIENT)
def score(statistics: Statistics) -> Tensor:
    """sum_e (dL_e/dw_ij)^2 over the examples e of the sample: (rows, in_features) float32, at least 0.

    L_e is the example's share of its batch's loss: its tokens' losses over the batch's own normalizer. FISH mask (Sung
    et al., NeurIPS 2021), the ``fisher_info`` of Liu et al., ACL 2025, there divided by the number of examples.
    """
    return statistics.squared_gradient
