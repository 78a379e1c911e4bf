"""`lift`: the principal weights, which remain when the weight is reduced to a low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import WEIGHT, Statistics
from axolotl_spft.salience.untouched import untouched_rng

# columns that the randomized decomposition takes beside those of the rank, and its passes over W
_OVERSAMPLED, _ITERATIONS = 32, 4


@needs(WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """|(W_r)_ij|, with W_r = U_r S_r V_r^T the best approximation of W of rank r: (rows, in_features) float32.

    r is ``lift_rank``, or less than half of W's smaller side. The decomposition is randomized (Halko et al., 2011) and
    drawn from the seed, the same on every rank. LIFT (Liu et al., arXiv 2506.00772).
    """
    weight, smaller = statistics.whole_weight, min(statistics.shape)
    rank = max(1, min(statistics.lift_rank, (smaller - 1) // 2))
    with untouched_rng():
        torch.manual_seed((statistics.seed * 1_000_003 + statistics.index) % 2**63)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + _OVERSAMPLED, smaller), niter=_ITERATIONS)
    return ((u[statistics.rows, :rank] * s[:rank]) @ v[:, :rank].t()).abs_()
