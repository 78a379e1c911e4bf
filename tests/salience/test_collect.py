"""Gathering dense gradients of frozen weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience import collect
from axolotl_spft.salience.collect import fits, gathered_gradients, gathered_sums, place_of, should_share_rows
from axolotl_spft.salience.examples import Tokens
from axolotl_spft.salience.metrics.statistics import GRADIENT, SQUARED_GRADIENT

ENTRIES = 1000


def test_frozen_layers_that_nothing_trained_precedes_take_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).requires_grad_(False)
    layers = {"0": model[0], "2": model[2]}
    x = torch.randn(4, 6, 5)
    with gathered_gradients(model, layers) as sums:
        for _ in range(2):
            model(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    (2 * model(x).square().sum()).backward()
    for name, total in sums.items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, layers[name].weight.grad)


def test_without_gradients_nothing_is_gathered_and_hooks_go():
    model = nn.Sequential(nn.Linear(5, 7)).requires_grad_(False)
    with gathered_gradients(model, {"0": model[0]}) as sums, torch.no_grad():
        model(torch.randn(2, 5))
    assert not sums["0"].any()
    assert not model[0]._forward_hooks


def test_one_dense_gradient_is_alive_at_a_time():
    """Beside the accumulators no two tensors of a weight's size live at once."""
    sizes = [(64 + 2 * i, 64 + 2 * i + 2) for i in range(4)]
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in sizes)).requires_grad_(False)
    weight_sizes = {i * o for i, o in sizes}
    alive, most = set(), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() in weight_sizes and func is torch.ops.aten.mm.default:
                import weakref

                alive.add(weakref.ref(out, alive.discard))
                most = max(most, len(alive))
            return out

    with gathered_gradients(model, {str(i): layer for i, layer in enumerate(model)}) as sums, Watch():
        model(torch.randn(2, 64)).sum().backward()
    assert all(total.any() for total in sums.values())
    assert most == 1


@pytest.mark.parametrize(("free", "enough"), [(8 * ENTRIES, True), (8 * ENTRIES - 1, False)])
def test_accumulators_fit_in_half_of_a_gpus_free_memory(monkeypatch, free, enough):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    assert fits(ENTRIES, torch.device("cuda")) == enough
    assert fits(ENTRIES, torch.device("cpu"))
    # the option takes the place of that half, whatever is free
    for memory_gib, holds in ((4 * ENTRIES / 2**30, True), (3.99 * ENTRIES / 2**30, False)):
        assert fits(ENTRIES, torch.device("cuda"), memory_gib) == holds
        assert place_of(ENTRIES, torch.device("cuda"), memory_gib).type == ("cuda" if holds else "cpu")


def test_accumulators_are_made_where_the_one_function_says(monkeypatch):
    model, asked = nn.Sequential(nn.Linear(5, 7)).requires_grad_(False), []

    def place(entries: int, device: torch.device, memory_gib: float | None) -> torch.device:
        asked.append((entries, device.type, memory_gib))
        # not the layer's, on any machine
        return torch.device("meta")

    monkeypatch.setattr(collect, "place_of", place)
    needs = (GRADIENT, SQUARED_GRADIENT)
    with gathered_sums(model, {"0": model[0]}, needs, Tokens({}), memory_gib=3.0) as sums:
        model(torch.randn(2, 4, 5)).sum().backward()
    assert {sums[need]["0"].device.type for need in needs} == {"meta"}
    assert asked == [(2 * 35, "cpu", 3.0)]


@pytest.mark.parametrize(
    ("world", "names", "shared"),
    [
        (1, ("q_proj", "k_proj"), False),
        (2, ("q_proj", "k_proj"), True),
        # rank 1 may route nothing to an expert that rank 0 runs
        (2, ("q_proj", "mlp.experts.3.w1"), False),
    ],
)
def test_ranks_share_rows_where_whole_accumulators_do_not_fit(monkeypatch, world, names, shared):
    layers, ranks = {name: nn.Linear(5, 7) for name in names}, Ranks(0, world)
    assert not should_share_rows(layers, ranks)
    monkeypatch.setattr(collect, "fits", lambda entries, *_: entries < 2 * 5 * 7)
    assert should_share_rows(layers, ranks) == shared
    # two sums for each weight of one layer take as much as one for each of two
    one = {names[0]: layers[names[0]]}
    assert not should_share_rows(one, ranks)
    assert should_share_rows(one, ranks, accumulators=2) == (world == 2)
