"""`magnitude`: the size of the pretrained weight."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import WEIGHT, Statistics


@needs(WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """|w_ij| of the pretrained weight, dequantized where it is quantized: (rows, in_features) float32."""
    return statistics.weight.abs()
