"""The product with W alone, and its gradients of any order."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.frozen import frozen_linear
from axolotl_spft.ops.linear import register_owner
from tests.ops.test_linear import DenseOwner, random_case


@pytest.fixture(params=["eager", "op"])
def product(request):
    """frozen_linear as it is called in eager mode, and as a compiled graph holds it."""
    weight, _, _, x, bias = random_case(7, 5, 3)
    owner = DenseOwner(weight)
    number = register_owner(owner)
    run = {
        "eager": lambda x, bias=None: frozen_linear(x, bias, 7, owner, number),
        "op": lambda x, bias=None: torch.ops.spft.frozen_linear(x, bias, 7, number),
    }
    yield weight, x, bias, run[request.param]


def test_gradients_of_the_first_to_the_third_order(product):
    weight, x, bias, multiply = product
    assert torch.autograd.gradcheck(multiply, (x, bias))
    assert torch.autograd.gradgradcheck(multiply, (x, bias))

    def third(multiply):
        loss = multiply(x, bias).sin().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = gradient.square().sum()
        return torch.autograd.grad(loss, (x, bias))

    expected = third(lambda x, bias: torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(third(multiply), expected)


def test_the_gradient_alone_makes_no_graph(product):
    _, x, _, multiply = product
    (gradient,) = torch.autograd.grad(multiply(x).square().sum(), x)
    assert not gradient.requires_grad
