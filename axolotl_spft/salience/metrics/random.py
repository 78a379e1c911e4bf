"""`random`: the control, which knows nothing of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import Statistics


@needs()
def score(statistics: Statistics) -> Tensor:
    """Uniform in [0, 1): (rows, in_features) float32; drawn on the CPU, so that every device gets the same."""
    # an odd multiplier keeps the streams of neighbouring seeds and layers apart
    generator = torch.Generator().manual_seed((statistics.seed * 1_000_003 + statistics.index) % 2**63)
    return torch.rand(statistics.shape, generator=generator, dtype=torch.float32)[statistics.rows]
