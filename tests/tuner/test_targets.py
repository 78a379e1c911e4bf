"""Which modules can have a sparse delta: those that are refused would compute something else than their weight says."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear

from axolotl_spft import SpftConfig
from tests.models import tiny_llama


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def adapted(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(module)
    return get_peft_model(model, SpftConfig(target_modules=["0"], density=0.2, init_weights=False))


@pytest.mark.parametrize("kind", [Renamed, FalconLinear])
def test_subclasses_that_multiply_by_their_weight(kind):
    model, x = adapted(kind(13, 7)), torch.randn(5, 13)
    before = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scaled(13, 7), "`0` is a Scaled, which is not supported"),
        (lambda: parametrizations.weight_norm(nn.Linear(13, 7)), "parametrized one: remove the parametrization"),
        (lambda: nn.Linear(13, 7).to(torch.float8_e4m3fn), "its is of torch.float8_e4m3fn"),
    ],
    ids=["own forward", "parametrized", "float8"],
)
def test_other_linear_layers_are_refused_by_name(make, said):
    with pytest.raises(TypeError, match=said):
        adapted(make())


def test_a_layer_of_another_adapter_is_refused_by_name():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(TypeError, match=r"q_proj` is adapted by a peft\.tuners\.lora\.layer\.Linear already: merge"):
        get_peft_model(model, SpftConfig(target_modules=["q_proj"]))
