"""Every method trains, as many parameters as the others, and keeps what it says."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from axolotl_spft.bench.base import make_base, target_layers, target_modules, text_batch
from axolotl_spft.bench.contestant import Contestant, spread
from axolotl_spft.bench.kept import kept_for_backward
from axolotl_spft.bench.methods import METHODS, Budget
from axolotl_spft.bench.shapes import model_config
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tools.bench import METHODS as COMMAND_METHODS
from axolotl_spft.tools.bench import OF_SALIENCES

CPU = torch.device("cpu")
ADAPTERS = [name for name in COMMAND_METHODS if name not in ("limit", "full")]


def contestant(options, name):
    return Contestant(name, options, own_process=False)


def test_the_command_offers_every_method():
    assert tuple(METHODS) == COMMAND_METHODS + OF_SALIENCES


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_all_adapters_train_equally_many(tiny_options, quantization):
    options = tiny_options(quantization=quantization, serving=False)
    trained = {
        name: contestant(options, name).method.trained
        for name in ADAPTERS
        if quantization == "none" or METHODS[name].not_on_4bit is None
    }
    layers = target_layers(make_base(model_config(options.model, 24), torch.float32, CPU)).values()
    magnitudes = sum(layer.out_features for layer in layers)
    assert trained.pop("dora") == trained["lora"] + magnitudes
    assert set(trained.values()) == {2 * sum(layer.out_features + layer.in_features for layer in layers)}


def test_a_density_gives_lora_the_nearest_rank(tiny_options):
    base = make_base(model_config(tiny_options().model, 24), torch.float32, CPU)
    layers = target_layers(base).values()
    per_rank = sum(layer.out_features + layer.in_features for layer in layers)
    entries = sum(layer.out_features * layer.in_features for layer in layers)
    budget = Budget.of(base, None, 0.2)
    assert abs(budget.rank * per_rank - 0.2 * entries) <= per_rank / 2
    assert Budget.of(base, None, 1e-6).rank == 1


def test_a_rank_and_a_density_set_each_methods_own_count(tiny_options):
    options = tiny_options(rank=2, density=0.01, serving=False)
    layers = target_layers(make_base(model_config(options.model, 24), torch.float32, CPU)).values()
    trained = {name: contestant(options, name).method.trained for name in ("spft-gradient", "lora", "shira")}
    of_lora = 2 * sum(layer.out_features + layer.in_features for layer in layers)
    share = 0.01 * sum(layer.out_features * layer.in_features for layer in layers)
    assert trained["lora"] == trained["shira"] == of_lora
    assert abs(trained["spft-gradient"] - share) <= len(layers)


@pytest.mark.parametrize("name", COMMAND_METHODS)
def test_a_round_trains_exactly_what_the_method_says(tiny_options, name):
    runner = contestant(tiny_options(serving=False), name)
    before = copy.deepcopy({key: value for key, value in runner.method.model.named_parameters()})
    runner.round()
    changed = {key for key, value in runner.method.model.named_parameters() if not torch.equal(value, before[key])}
    trained = {key for key, value in before.items() if value.requires_grad}
    if name.startswith("spft"):
        # the base's own weights hold W + S while the adapter is in use
        changed = {key for key in changed if "base_layer" not in key}
    assert changed <= trained
    assert bool(changed) == (name != "limit")


def test_a_concentrated_mask_keeps_less_than_lora(tiny_options):
    options = tiny_options(area=0.04, rank=None, density=0.01, serving=False)
    spft, lora = (contestant(options, name) for name in ("spft-gradient", "lora"))
    assert spft.method.area == pytest.approx(0.04, abs=0.01)
    assert spft.kept.by_adapted < 0.5 * lora.kept.by_adapted
    assert spft.kept.all < lora.kept.all


def test_the_limit_keeps_nothing_in_its_frozen_layers(tiny_options):
    assert contestant(tiny_options(), "limit").kept.by_adapted == 0


def test_what_a_linear_layer_keeps_is_counted_once(tiny_options):
    # full fine-tuning keeps the input of every layer: one for q, k and v, one for gate and up
    hidden, intermediate, tokens, layers = 48, 72, 24, 2
    kept = contestant(tiny_options(), "full").kept
    assert kept.by_adapted == layers * tokens * (3 * hidden + intermediate) * 4


def test_checkpointing_keeps_the_blocks_inputs(tiny_options):
    config = model_config(tiny_options().model, 24)
    kept = {}
    for checkpointing in (False, True):
        base = make_base(config, torch.float32, CPU, gradient_checkpointing=checkpointing)
        kept[checkpointing] = kept_for_backward(base, text_batch(97, 24, CPU), target_modules(base))
    assert 2 * 24 * 48 * 4 < kept[True].all < kept[False].all


def test_the_footprint_is_that_of_the_tensors(tiny_options):
    footprint = {name: contestant(tiny_options(), name).footprint for name in ("spft-gradient", "shira", "lora")}
    trained = contestant(tiny_options(), "lora").method.trained
    layers = adapted_layers(contestant(tiny_options(), "spft-gradient").method.model).values()
    spft = footprint["spft-gradient"]
    assert spft["values"] == spft["gradients"] == spft["originals"] == 4 * trained
    # two moments, and a step count for each matrix
    assert spft["optimizer_state"] == (8 * trained) + 14 * 4
    # the mask as in its file, and lists of rows and columns
    assert spft["masks"] == 2 * trained + sum(4 * (layer.out_features + 1) for layer in layers)
    assert 0 < spft["derived"] <= sum(4 * (2 * layer.out_features + 4 * layer.in_features) for layer in layers)
    assert footprint["shira"]["masks"] == 8 * trained
    assert footprint["lora"]["masks"] == footprint["lora"]["derived"] == footprint["lora"]["originals"] == 0


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([1.0]) == 0


def test_a_graph_that_was_dropped_keeps_nothing():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x):
            # as DoRA, which detaches a norm whose graph it has made
            scale = (x * x).exp().sum().detach()
            return SimpleNamespace(loss=(self.q_proj(x) * scale).sum())

    x = torch.randn(5, 8, requires_grad=True)
    kept = kept_for_backward(Model().requires_grad_(False), {"x": x}, ["q_proj"])
    assert kept.all == x.element_size()  # the scale
