"""The best low-rank approximation of a quantization error, for the inputs that a layer has."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_low_rank(error: Tensor, rms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) that minimize ||(error - B A) diag(rms)||, with equal norms in both.

    Args:
        error: W - Q(W), (out_features, in_features).
        rms: Root mean square of each input column, (in_features), up to a factor.
        rank: Columns of B.
    """
    rms = rms.clamp_min(1e-8)
    left, sizes, right = torch.linalg.svd(error * rms, full_matrices=False)
    roots = sizes[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank] / rms
