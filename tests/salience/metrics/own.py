"""Score functions such as a user may write, and some that go wrong."""

from __future__ import annotations

import torch

from axolotl_spft.salience.metrics.metric import needs
from axolotl_spft.salience.metrics.statistics import GRADIENT, INPUT_SQUARES, WEIGHT, Statistics

BROKEN_LAYER = "model.layers.1.mlp.up_proj"


@needs(WEIGHT, INPUT_SQUARES)
def by_inputs(statistics: Statistics) -> torch.Tensor:
    """As Wanda prunes: |w_ij| times the norm of input j."""
    return statistics.weight.abs() * statistics.input_squares.sqrt()


def plain(statistics: Statistics) -> torch.Tensor:
    return statistics.gradient.abs()


def _broken(statistics: Statistics) -> bool:
    # draws numbers, as a careless function may
    torch.rand(3)
    return statistics.name == BROKEN_LAYER


def wrong_shape(statistics: Statistics) -> torch.Tensor:
    return statistics.gradient.t() if _broken(statistics) else statistics.gradient


def not_finite(statistics: Statistics) -> torch.Tensor:
    return statistics.gradient / (0 if _broken(statistics) else 1)


def raises(statistics: Statistics) -> torch.Tensor:
    return {"the key": statistics.gradient}["the key" if not _broken(statistics) else "another"]


def no_tensor(statistics: Statistics):
    return statistics.gradient if not _broken(statistics) else None


@needs(GRADIENT)
def undeclared(statistics: Statistics) -> torch.Tensor:
    return statistics.weight if _broken(statistics) else statistics.gradient


@needs("momentum")
def unknown_need(statistics: Statistics) -> torch.Tensor:
    return statistics.gradient


not_callable = 3
