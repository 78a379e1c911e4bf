"""The salience of each entry of a weight (Liu et al., ACL 2025, section 3).

Each score is float32 and at least 0, and has the shape of its argument: (out_features, in_features), or on several
ranks the rows that one of them looks after. Higher is more salient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks

_ONE_PROCESS = Ranks()
NEEDS_GRADIENT = frozenset({"gradient", "balanced"})


def gradient_score(gradient: Tensor) -> Tensor:
    """|g_ij|, with g the loss gradient summed over the sample."""
    return gradient.abs()


def balanced_score(gradient: Tensor, out_features: int, ranks: Ranks = _ONE_PROCESS) -> Tensor:
    """|g_ij| / sqrt(rms(g_i.) rms(g_.j)): spreads the mask over rows and columns. Zero rows and columns score 0."""
    squares = gradient.square()
    row_rms = squares.mean(1, keepdim=True).sqrt()
    column_rms = (ranks.sum_(squares.sum(0, keepdim=True)) / out_features).sqrt()
    scale = row_rms.sqrt() * column_rms.sqrt()
    return torch.where(scale > 0, gradient.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def magnitude_score(weight: Tensor) -> Tensor:
    """|w_ij| of the pretrained weight."""
    return weight.to(torch.float32).abs()


def random_score(shape: tuple[int, int], seed: int, layer_index: int) -> Tensor:
    """Uniform in [0, 1), drawn on the CPU so that every device gets the same."""
    # an odd multiplier keeps the streams of neighbouring seeds and layers apart
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer_index) % 2**63)
    return torch.rand(shape, generator=generator, dtype=torch.float32)
