"""Metrics that are tried beside the built-in ones, named as a user names his: `integration.evidence.own_scores:spread`.

Both lie between `gradient`, which takes the largest entries alone, and `random`, which covers rows and columns evenly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.salience.metrics.balanced import rms_of_rows_and_columns
from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.random import score as uniform
from axolotl_spft.salience.metrics.statistics import GRADIENT, Statistics


@needs(GRADIENT)
def spread(statistics: Statistics) -> Tensor:
    """|g_ij| / (rms(g_i.) rms(g_.j)): further from the gradient's rows and columns than `balanced` is."""
    rows, columns = rms_of_rows_and_columns(statistics)
    return statistics.gradient.abs() / (rows * columns).clamp_min(1e-30)


@needs(GRADIENT)
def sampled(statistics: Statistics) -> Tensor:
    """|g_ij| / e_ij, e exponential: the largest are a sample without replacement, with p in proportion to |g|."""
    gradient = statistics.gradient
    exponential = -torch.log1p(-uniform(statistics)).to(gradient.device)
    return gradient.abs() / exponential.clamp_min(1e-12)
