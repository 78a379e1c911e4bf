"""`grasp`: how much a weight adds to the flow of the gradient."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import HESSIAN_GRADIENT, WEIGHT, Statistics


@needs(HESSIAN_GRADIENT, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """w_ij (H g)_ij, with g and H the gradient and the Hessian of the loss summed over the sample.

    H is that of all targeted weights together. (rows, in_features) float32, of either sign. GraSP (Wang et al., ICLR
    2020) scores -w (H g) and keeps the lowest; the code of Liu et al., ACL 2025, takes the largest of w (H g), which is
    the same, and so does this. It also divides the logits by 200; here the loss is the trainer's own.
    """
    return statistics.weight * statistics.hessian_gradient
