"""What the weight of a module of experts is, while something else stands in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_spft.tuner.expert_weight import replaced, weight_in
from tests.experts import four_bit_experts, tiny_mixtral


@pytest.mark.parametrize("quantize", [lambda model: model, four_bit_experts], ids=["plain", "4 bit"])
def test_what_stands_in_the_place_of_a_weight_is_not_taken_for_it(quantize):
    experts = quantize(tiny_mixtral(num_hidden_layers=1)).model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()
    other = torch.zeros_like(before)
    with replaced(experts, "down_proj", other):
        assert experts.down_proj is other
        assert torch.equal(weight_in(experts, "down_proj"), before)
    assert torch.equal(experts.down_proj, before)


def test_what_others_have_put_before_a_parametrization_is_asked():
    """As accelerate does, which brings in what it keeps elsewhere."""
    experts = four_bit_experts(tiny_mixtral(num_hidden_layers=1)).model.layers[0].mlp.experts
    others = torch.full_like(experts.down_proj.detach(), 2)
    held: nn.Module = experts.parametrizations["down_proj"]
    held.forward = lambda: others
    with replaced(experts, "down_proj", torch.zeros_like(others)):
        assert weight_in(experts, "down_proj") is others
    assert experts.down_proj is others
