"""Several threads that compute with one model: what one has written for itself, another must not find and lose."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

from axolotl_spft import SpftConfig
from axolotl_spft.salience.install import adapted_layers
from tests.interpreter import DEVICE
from tests.threads import SOON, in_threads


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return get_peft_model(net, SpftConfig(density=0.4, target_modules=["0", "1"], init_weights=False)).to(DEVICE)


def reading(layer):
    """W + S of a layer, to be read within a block as its forward pass does."""
    delta, values = layer.delta_of(("default",))
    return layer.effective_weight(values, delta)


def sum_of(layer) -> torch.Tensor:
    return layer.get_base_weight() + layer.get_delta_weight("default")


@pytest.mark.parametrize("ahead", [True, False])
def test_what_a_layer_writes_for_itself_is_its_threads_own(model, ahead):
    layer = model.base_model.model[0]
    if not ahead:
        model.base_model._stop_writing_ahead()
    expected, got = sum_of(layer), []
    entered, left = threading.Event(), threading.Event()

    def first():
        with reading(layer):
            other.start()
            entered.wait(SOON)
        left.set()

    def second():
        with reading(layer) as weight:
            entered.set()
            left.wait(SOON)
            got.append(weight.clone())

    other = threading.Thread(target=second, daemon=True)
    in_threads(first)
    other.join(30)
    assert torch.equal(got[0], expected)


def test_outside_a_pass_a_thread_does_not_lose_what_the_pass_of_another_has_written(model):
    layer, x = model.base_model.model[0], torch.randn(4, 5, device=DEVICE)
    expected, got = sum_of(layer), []
    assert torch.equal(model(x), model(x))
    running, entered, ended = threading.Event(), threading.Event(), threading.Event()

    def wait(*_):
        running.set()
        entered.wait(SOON)

    model.base_model.model[1].register_forward_pre_hook(wait)

    def passes():
        model(x)
        ended.set()

    def reads():
        running.wait(30)
        with reading(layer) as weight:
            entered.set()
            ended.wait(SOON)
            got.append(weight.clone())

    in_threads(passes, reads)
    assert torch.equal(got[0], expected)


def test_a_thread_that_trains_and_one_that_evaluates(model):
    """The backward pass writes for its own thread alone."""
    x = torch.randn(4, 5, device=DEVICE)
    base = [layer.get_base_weight().clone() for layer in adapted_layers(model).values()]
    values = [layer.spft_values["default"] for layer in adapted_layers(model).values()]
    expected = model(x).detach()
    gradients = torch.autograd.grad(model(x).square().sum(), values)
    got, found = [], []

    def trains():
        for _ in range(30):
            found.append(torch.autograd.grad(model(x).square().sum(), values))

    def evaluates():
        with torch.no_grad():
            got.extend(model(x) for _ in range(60))

    in_threads(trains, evaluates, evaluates)
    assert all(torch.equal(y, expected) for y in got)
    assert all(all(map(torch.equal, each, gradients)) for each in found)
    assert all(map(torch.equal, base, [layer.get_base_weight() for layer in adapted_layers(model).values()]))
