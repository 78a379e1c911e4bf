"""Contexts that put everything back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from axolotl_spft.salience.untouched import untouched_model, untouched_rng


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators(fails):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    try:
        with untouched_rng():
            draw()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert draw() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_flags_modes_and_buffers(fails):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    gradient = torch.ones(3, 3)
    model[2].weight.grad = gradient
    mean = model[1].running_mean.clone()
    try:
        with untouched_model(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model.train()
            model(torch.randn(5, 3))
            assert not torch.equal(model[1].running_mean, mean)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [False] + [True] * 5
    assert model[2].weight.grad is gradient
    assert torch.equal(model[1].running_mean, mean)
    assert (model[0].training, model[1].training, model[2].training) == (True, True, False)
