"""`synflow`: the flow through a weight in the network of absolute weights, without any data."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import SYNAPTIC_FLOW, WEIGHT, Statistics


@needs(SYNAPTIC_FLOW, WEIGHT)
def score(statistics: Statistics) -> Tensor:
    """||w_ij| dR/d|w_ij||, R the summed output of the network with absolute weights and identity activations.

    (rows, in_features) float32, at least 0. SynFlow (Tanaka et al., NeurIPS 2020), as in the code of Liu et al., ACL
    2025: see `axolotl_spft.salience.data_free` for what a transformer's network of absolute weights is.
    """
    return (statistics.weight * statistics.synaptic_flow).abs_()
