"""A forward pass that writes all weights at its start is the one in which each layer writes its own."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from axolotl_spft import SpftConfig
from axolotl_spft.ops.backends.cpu_library import library
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.tuner import base_weight, write_ahead
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.state import spft_layers
from axolotl_spft.tuner.write_ahead import WriteAhead
from tests.interpreter import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and library(torch.float32) is None, reason="there is neither a GPU nor a C compiler"
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(20, 33), Conv1D(9, 33), nn.Linear(9, 20)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = SpftConfig(target_modules=["first", "second", "third"])
    model = get_peft_model(Net(), config)
    model.add_adapter("other", config)
    for layer in spft_layers(model).values():
        for name, count in (("default", 40), ("other", 25)):
            at = torch.randperm(layer.in_features * layer.out_features)[:count].sort().values
            layer.set_mask(name, mask_from_positions(at, layer.out_features, layer.in_features), torch.randn(count))
    return model.to(DEVICE)


@pytest.fixture
def x():
    return torch.randn(7, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@contextmanager
def writes(monkeypatch, *counts, kind="write_sum_"):
    """How often layers write by themselves inside the block is one of ``counts``."""
    calls = []
    with monkeypatch.context() as patch:
        original = getattr(base_weight, kind)
        patch.setattr(base_weight, kind, lambda *args: calls.append(0) or original(*args))
        yield
    assert len(calls) in counts


def reverts(monkeypatch, *counts):
    """How often layers put their own weight back inside the block is one of ``counts``."""
    return writes(monkeypatch, *counts, kind="restore_")


def by_itself(model, x):
    """The same from a copy whose layers each write their own weight."""
    twin = copy.deepcopy(model)
    twin.base_model._stop_writing_ahead()
    return twin(x)


def test_layers_write_only_the_first_time(model, x, monkeypatch):
    with writes(monkeypatch, 3):
        model(x)
    for _ in range(2):
        with torch.no_grad():
            for layer in spft_layers(model).values():
                layer.spft_values["default"].mul_(-1.5)
        with writes(monkeypatch, 0):
            y = model(x)
        assert torch.equal(y, by_itself(model, x))


def test_a_module_writes_ahead_while_it_is_attached(model, x, monkeypatch):
    model.base_model._stop_writing_ahead()
    net = model.base_model.model
    with writes(monkeypatch, 6):
        net(x)
        expected = net(x)
    handles = WriteAhead(net).attach(net)
    with writes(monkeypatch, 0):
        assert torch.equal(net(x), expected)
    for handle in handles:
        handle.remove()
    with writes(monkeypatch, 3):
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_every_way_into_the_model_writes_ahead(task, monkeypatch):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    spft = SpftConfig(target_modules="all-linear", init_weights=False, task_type=task)
    model = get_peft_model(LlamaForCausalLM(config), spft).to(DEVICE)
    ids = torch.arange(5, device=DEVICE)[None]
    model(input_ids=ids)
    at_once = []
    write_sums_ = write_ahead.write_sums_
    monkeypatch.setattr(write_ahead, "write_sums_", lambda sums: at_once.append(0) or write_sums_(sums))
    with writes(monkeypatch, 0):
        model(input_ids=ids)
        assert len(at_once) == 1
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        # once for all tokens, where PEFT generates through the tuner and not past it
        assert len(at_once) == (2 if task else 4)
    base = model.unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


def test_training_is_the_same(model, x, monkeypatch):
    alone = copy.deepcopy(model)
    alone.base_model._stop_writing_ahead()
    results = []
    for each in (model, alone):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(4):
            loss = each(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, [p.detach().clone() for p in each.parameters()]))
    assert results[0][0] == results[1][0]
    assert len(set(results[0][0])) == 4
    assert all(map(torch.equal, results[0][1], results[1][1]))


def flip(model):
    for layer in spft_layers(model).values():
        layer.spft_values["default"].data.neg_()


def replace(model):
    for layer in spft_layers(model).values():
        layer.spft_values["default"].data = layer.spft_values["default"].data * 3


def move(model):
    for layer in spft_layers(model).values():
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.clone()


def choose(model):
    model.set_adapter("other")


def choose_both(model):
    model.base_model.set_adapter(["default", "other"])


def merge(model):
    model.merge_adapter()


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def new_mask(model):
    layer = model.base_model.model.second
    layer.set_mask("default", mask_from_positions(torch.arange(0, 100, 9), 9, 33), torch.ones(12))


def convert(model):
    model.to(torch.float64).to(torch.float32)


def load(model):
    model.load_state_dict({name: tensor * 2 if "spft_values" in name else tensor
                           for name, tensor in model.state_dict().items()})  # fmt: skip


@pytest.mark.parametrize(
    "change", [flip, replace, move, choose, choose_both, merge, merge_and_back, new_mask, convert, load]
)
def test_whatever_changes_is_seen(model, x, change):
    base = [layer.get_base_weight().clone() for layer in spft_layers(model).values()]
    before = [model(x), model(x)][-1]
    change(model)
    for _ in range(3):
        y = model(x)
        assert torch.equal(y, by_itself(model, x))
    assert torch.equal(y, before) == (change in (move, merge, merge_and_back, convert))
    if change is not merge:
        with model.disable_adapter():
            assert all(map(torch.equal, base, [layer.get_base_weight() for layer in spft_layers(model).values()]))
            assert torch.equal(model(x), by_itself(model, x))
        assert torch.equal(model(x), y)


def test_adapters_that_ran_before_are_chosen_at_once(model, x, monkeypatch):
    base = [layer.get_base_weight().clone() for layer in spft_layers(model).values()]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = [model(x), model(x)][-1]
    for name in ("default", "other", "default"):
        with writes(monkeypatch, 0), reverts(monkeypatch, 0):
            model.set_adapter(name)
            assert all(map(torch.equal, base, held(model)))
            assert torch.equal(model(x), expected[name])
    with writes(monkeypatch, 0), reverts(monkeypatch, 0):
        with model.disable_adapter():
            assert all(map(torch.equal, base, held(model)))
            assert torch.equal(model(x), by_itself(model, x))
        assert torch.equal(model(x), expected["default"])


def warmed_up(model, x):
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        model(x)
        model(x)
    return model


def own(model):
    return list(spft_layers(model).values())


def held(model):
    """What the weights hold now: (out_features, in_features) each."""
    weights = [layer.get_base_layer().weight.data for layer in own(model)]
    return [weight.t() if layer.transposed else weight for layer, weight in zip(own(model), weights)]


def delete_and_add(model):
    model.delete_adapter("default")
    model.add_adapter("default", SpftConfig(target_modules=["first", "second", "third"]))
    for layer in own(model):
        at = torch.arange(0, 30, 3, device=DEVICE)
        mask = mask_from_positions(at, layer.out_features, layer.in_features)
        layer.set_mask("default", mask, torch.ones(10))


def load_base(model):
    for layer in own(model):
        state = layer.state_dict().items()
        layer.load_state_dict({name: tensor * 2 if "base_layer" in name else tensor for name, tensor in state})


def share(model):
    model.base_model.model.first.share_weight(True)


def choose_behind_its_back(model):
    for layer in own(model):
        layer._active_adapter = ["default"]


@pytest.mark.parametrize(
    "change",
    [lambda _: None, flip, replace, move, new_mask, convert, load, merge_and_back, delete_and_add, load_base,
     share, choose_behind_its_back],
)  # fmt: skip
def test_what_changes_while_another_adapter_is_chosen_is_seen(model, x, change):
    warmed_up(model, x)
    model.set_adapter("other")
    model(x)
    change(model)
    alone = by_itself(model, x)
    assert torch.equal(model(x), alone)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        base = [layer.get_base_weight().clone() for layer in own(model)]
        for _ in range(3):
            assert torch.equal(model(x), by_itself(model, x))
        with model.disable_adapter():
            assert all(map(torch.equal, base, held(model)))
            assert torch.equal(model(x), by_itself(model, x))


def test_layers_that_join_later_are_written_with_the_others(monkeypatch):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(20, 33), nn.Linear(20, 33)

        def forward(self, x, both):
            return self.q_proj(x) + (self.k_proj(x) if both else 0)

    model = get_peft_model(Either(), SpftConfig(target_modules=["q_proj", "k_proj"], init_weights=False)).to(DEVICE)
    x = torch.randn(3, 20, device=DEVICE)
    model(x, False)
    with writes(monkeypatch, 0):
        model(x, False)
    with writes(monkeypatch, 1):
        model(x, True)
    with writes(monkeypatch, 0):
        model(x, True)
        model(x, False)
    query, key = own(model)
    # makes the plan of both anew, for both copy the same columns of x
    key.set_mask("default", query.mask("default"), query.spft_values["default"].detach().clone())
    with writes(monkeypatch, 2):
        model(x, True)
    with writes(monkeypatch, 0):
        model(x, True)


def test_layers_that_choose_one_after_the_other(model, x):
    base = [weight.clone() for weight in held(model)]
    for name in ("default", "other"):
        model.set_adapter(name)
        model(x)
        model(x)
    for layer in own(model):
        layer._active_adapter = ["default"]
        model(x)
    with model.disable_adapter():
        assert all(map(torch.equal, base, held(model)))


def test_a_base_that_two_models_share_is_as_before_once_one_is_unloaded(x):
    base = Net().to(DEVICE)
    expected = base(x)
    config = SpftConfig(target_modules=["first", "third"], init_weights=False)
    get_peft_model(base, config, "one")
    other = get_peft_model(base, config, "two")
    other.set_adapter("two")
    other(x)
    assert not torch.equal(other(x), expected)
    unloaded = other.unload()
    for _ in range(3):
        assert torch.equal(unloaded(x), expected)


def test_a_layer_that_is_taken_out_keeps_its_weight(model, x):
    net = warmed_up(model, x).base_model.model
    weight = net.third.get_base_weight().clone()
    net.third = net.third.get_base_layer()
    for _ in range(3):
        assert torch.equal(model(x), by_itself(model, x))
    model.set_adapter("other")
    assert torch.equal(model(x), by_itself(model, x))
    assert torch.equal(net.third.weight, weight)


@pytest.mark.parametrize("held", [False, True])
def test_a_base_layer_that_is_replaced(model, x, held):
    layer = warmed_up(model, x).base_model.model.first
    if not held:
        layer.get_base_weight()
    layer.base_layer = copy.deepcopy(layer.base_layer)
    for name in ("default", "other", "default"):
        for _ in range(3):
            assert torch.equal(model(x), by_itself(model, x))
        model.set_adapter(name)


def test_layers_that_others_put_into_the_model_choose_too(model, x):
    net = warmed_up(model, x).base_model.model
    net.third = copy.deepcopy(net.third)
    model.set_adapter("other")
    assert net.third.active_adapters == ["other"]
    base = Net().to(DEVICE)
    one = get_peft_model(base, SpftConfig(target_modules=["first"], init_weights=False), "one")
    get_peft_model(base, SpftConfig(target_modules=["second"], init_weights=False), "two")
    one.set_adapter("one")
    assert [layer.active_adapters for layer in spft_layers(base).values()] == [["one"]] * 2


def test_a_mixture_of_adapters_leaves_each_of_them_written_at_once(model, x, monkeypatch):
    model.add_adapter("few", SpftConfig(target_modules=["second"]))
    layer = model.base_model.model.second
    layer.set_mask("few", mask_from_positions(torch.arange(0, 100, 9, device=DEVICE), 9, 33), torch.ones(12))
    warmed_up(model, x)
    model.base_model.set_adapter(["default", "few"])
    for _ in range(3):
        assert torch.equal(model(x), by_itself(model, x))
    model.set_adapter("default")
    model(x)
    with writes(monkeypatch, 0):
        model(x)


def test_an_adapter_that_cannot_be_added_changes_nothing(model, x, monkeypatch):
    model.base_model.model.act = nn.Tanh()
    warmed_up(model, x)
    with pytest.raises(TypeError, match="Tanh"):
        model.add_adapter("bad", SpftConfig(target_modules=["act"]))
    model.set_adapter("default")
    model(x)
    with writes(monkeypatch, 0):
        model(x)


def test_a_pass_that_ended_between_two_adapters(model, x):
    base = [weight.clone() for weight in held(model)]
    warmed_up(model, x)
    model.set_adapter("other")
    model(x)
    for layer in own(model):
        layer._active_adapter = ["default"]
    model.base_model.model.first(x)
    model(x)
    with model.disable_adapter():
        assert all(map(torch.equal, base, held(model)))


def test_a_backward_pass_after_a_merge_leaves_it(model, x):
    y = warmed_up(model, x)(x)
    model.merge_adapter()
    merged = [weight.clone() for weight in held(model)]
    y.sum().backward()
    assert all(map(torch.equal, merged, held(model)))


def test_two_adapters_with_one_mask(model, x):
    for layer in own(model):
        layer.set_mask("other", layer.mask("default"), torch.randn_like(layer.spft_values["default"]))
    gradients = []
    for between in (lambda: None, lambda: [model.set_adapter("other"), model(x)]):
        model.set_adapter("default")
        values = [layer.spft_values["default"] for layer in own(model)]
        y = model(x)
        between()
        for each in values:
            each.requires_grad_()
        gradients.append(torch.autograd.grad(y.square().sum(), values))
    assert all(map(torch.equal, *gradients))


def test_a_merged_model_stays_merged(model, x):
    warmed_up(model, x)
    model.merge_adapter(["default", "other"])
    merged = [weight.clone() for weight in held(model)]
    for _ in range(3):
        model(x)
    assert all(map(torch.equal, merged, held(model)))


def test_some_layers_without_the_adapter(model, x):
    model.add_adapter("few", SpftConfig(target_modules=["second"]))
    layer = model.base_model.model.second
    layer.set_mask("few", mask_from_positions(torch.arange(0, 100, 9, device=DEVICE), 9, 33), torch.ones(12))
    for name in ("default", "few", "other", "few", "default", "few"):
        model.set_adapter(name)
        for _ in range(3):
            assert torch.equal(model(x), by_itself(model, x))


def test_a_layer_that_is_disabled_alone(model, x):
    warmed_up(model, x)
    layer = model.base_model.model.second
    for enabled in (False, True, False):
        layer.enable_adapters(enabled)
        for _ in range(2):
            assert torch.equal(model(x), by_itself(model, x))


def test_tensors_of_a_deleted_adapter_are_not_kept(model, x):
    for name in ("default", "other"):
        model.set_adapter(name)
        model(x)
        model(x)
    values = [weakref.ref(layer.spft_values["other"]) for layer in own(model)]
    model.delete_adapter("other")
    model.set_adapter("default")
    model(x)
    gc.collect()
    assert [each() for each in values] == [None] * 3


@pytest.mark.parametrize("saved", [None, ["third"]])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_an_adapter_is_chosen_as_peft_chooses_it(saved, inference_mode, x, monkeypatch):
    config = SpftConfig(target_modules=["first", "second"], modules_to_save=saved, init_weights=False)
    model = get_peft_model(Net(), config).to(DEVICE)
    model.add_adapter("other", config)
    for names in ("other", "default", ["other"], ["default", "other"] if not saved else "other"):
        twin = copy.deepcopy(model)
        twin.base_model._stop_writing_ahead()
        model.base_model.set_adapter(names, inference_mode=inference_mode)
        with monkeypatch.context() as patch:
            patch.setattr(SpftLinear, "set_adapter", BaseTunerLayer.set_adapter)
            twin.base_model.set_adapter(names, inference_mode=inference_mode)
        found, expected = (
            ([(name, p.requires_grad) for name, p in each.named_parameters()], each.active_adapters,
             [module._active_adapter for module in each.modules() if hasattr(module, "_active_adapter")])
            for each in (model, twin)
        )  # fmt: skip
        assert found == expected
        assert torch.equal(model(x), twin(x))


def test_choosing_an_adapter_of_a_merged_model_unmerges_it_as_peft_does(model, x):
    expected = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert not model(x).equal(expected)
    model.set_adapter("default")
    assert torch.equal(model(x), expected)


def test_outside_the_model_a_layer_writes_by_itself(model, x, monkeypatch):
    model(x)
    model(x)
    layer = model.base_model.model.first
    before = layer(x)
    layer.spft_values["default"].data.neg_()
    with writes(monkeypatch, 1):
        assert not torch.equal(layer(x), before)


def test_an_error_in_the_pass_ends_it(model, x):
    model(x)
    with pytest.raises(RuntimeError):
        model(x[:, :3])
    layer = model.base_model.model.first
    before = layer(x)
    layer.spft_values["default"].data.neg_()
    assert not torch.equal(layer(x), before)


def test_copies_do_not_write_into_the_original(model, x):
    model(x)
    model(x)
    twin = copy.deepcopy(model)
    for layer in spft_layers(twin).values():
        layer.spft_values["default"].data.zero_()
    before = model(x)
    for _ in range(3):
        assert not torch.equal(twin(x), before)
    weights = [weight.clone() for weight in held(model)]
    twin(x)
    assert all(map(torch.equal, weights, held(model)))
