"""Several passes over groups of modules give the mask of one."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.salience import collect, compute, groups, scores
from axolotl_spft.salience.groups import groups_of
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import Metric
from tests.models import ARCHITECTURES, tiny_llama, token_batch
from tests.salience.test_untrained import Experts
from tests.salience.test_warm_up import chosen

BATCHES = [token_batch(rows=2, seed=seed) for seed in range(3)]
GIB_OF_TWO_MATRICES = 4 * 2 * 50 * 36 / 2**30


@pytest.mark.parametrize(("scope", "salience"), [("layer", "gradient"), ("row", "balanced"), ("layer", "snip")])
@pytest.mark.parametrize("architecture", ["llama", "moe"])
def test_the_mask_is_the_same_to_the_bit(monkeypatch, architecture, scope, salience):
    passes = []
    one_pass = compute.collect_statistics
    monkeypatch.setattr(compute, "collect_statistics", lambda *args: passes.append(args[1]) or one_pass(*args))
    masks = []
    for memory in (None, GIB_OF_TWO_MATRICES):
        config = SpftConfig(density=0.05, scope=scope, salience=salience, samples=4, salience_memory_gib=memory)
        model = get_peft_model(ARCHITECTURES[architecture](attention_dropout=0.3), config)
        model.train()
        torch.manual_seed(5)
        report = select_mask(model, iter(BATCHES))
        assert report.samples == 4
        masks.append(chosen(model))
    assert masks[0] == masks[1]
    assert len(passes) > 3


def test_what_no_gradient_reaches_in_a_later_group():
    masks = []
    for memory in (None, 4 * 30 / 2**30):
        torch.manual_seed(0)
        config = SpftConfig(target_modules=r"experts\.\d", density=0.5, salience_memory_gib=memory)
        model = get_peft_model(Experts(), config)
        with pytest.warns(UserWarning, match="may need more `samples`"):
            select_mask(model, [{"x": torch.ones(3, 6)}], lambda model, batch: model(**batch).square().sum())
        masks.append(chosen(model))
    assert masks[0] == masks[1] and [len(mask) for mask in masks[0]] == [23, 0, 22]


@pytest.mark.parametrize("salience", ["gradient", "balanced", "snip", "fisher"])
def test_the_mask_is_the_same_to_the_bit_wherever_the_sums_are_kept(monkeypatch, salience):
    """On a machine without a GPU the device is the host, and what differs is the number of passes alone."""
    masks, places = [], {"device": lambda entries, device, _: device, "host": lambda *_: torch.device("cpu")}
    for place in (*places, "passes"):
        monkeypatch.setattr(collect, "place_of", places.get(place, places["device"]))
        memory = GIB_OF_TWO_MATRICES if place == "passes" else None
        config = SpftConfig(density=0.05, salience=salience, samples=4, salience_memory_gib=memory)
        model = get_peft_model(tiny_llama(), config)
        select_mask(model, BATCHES)
        masks.append(chosen(model))
    assert masks[0] == masks[1] == masks[2]


def test_a_score_reads_its_sums_where_the_weight_is(monkeypatch):
    layers = adapted_layers(get_peft_model(tiny_llama(), SpftConfig()))
    kept = {name: torch.zeros(layer.out_features, layer.in_features) for name, layer in layers.items()}
    seen = []

    def score(statistics):
        seen.append(statistics.gradient.device.type)
        return torch.zeros(statistics.shape)

    # not where the sums are, on any machine
    monkeypatch.setattr(scores, "device_of", lambda layer: torch.device("meta"))
    scores.scorer(Metric("own", frozenset({"gradient"}), score), layers, {"gradient": kept}, Ranks())(3)
    assert seen == ["meta"]


@pytest.mark.parametrize("options", [{"scope": "global"}, {"pattern": "block", "block_size": [4, 5]}], ids=str)
def test_what_is_needed_at_once_goes_to_the_host_of_a_gpu(monkeypatch, options):
    asked, fits = [], collect.fits
    monkeypatch.setattr(groups, "devices_of", lambda layers: {torch.device("cuda")})
    monkeypatch.setattr(collect, "fits", lambda *args: asked.append(args[2]) or fits(*args))
    masks = []
    for memory in (None, GIB_OF_TWO_MATRICES):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience_memory_gib=memory, **options))
        select_mask(model, BATCHES)
        masks.append(chosen(model))
    assert masks[0] == masks[1]
    assert asked == [None, GIB_OF_TWO_MATRICES]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"salience": "balanced"}], ids=str)
def test_a_gpu_gives_one_mask_with_sums_on_it_on_the_host_and_in_several_passes(options):
    masks = []
    for memory in (None, GIB_OF_TWO_MATRICES):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience_memory_gib=memory, **options)).cuda()
        batches = [{k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in each.items()} for each in BATCHES]
        select_mask(model, batches)
        masks.append(chosen(model))
    assert masks[0] == masks[1]


def test_groups_hold_as_much_as_the_memory():
    layers = adapted_layers(get_peft_model(tiny_llama(), SpftConfig()))
    found = groups_of(layers, {"gradient"}, GIB_OF_TWO_MATRICES)
    assert [name for group in found for name in group] == list(layers)
    sizes = [sum(4 * layer.out_features * layer.in_features for layer in group.values()) for group in found]
    assert all(size <= GIB_OF_TWO_MATRICES * 2**30 for size in sizes) and len(found) > 2
    assert len(groups_of(layers, {"gradient"}, 1e-9)) == len(layers)
    assert len(groups_of(layers, {"gradient"}, None)) == len(groups_of(layers, {"weight"}, 1e-9)) == 1


@pytest.mark.parametrize("options", [{"scope": "global"}, {"pattern": "block"}, {"salience": "grasp"}], ids=str)
def test_what_needs_all_scores_at_once_says_so(options):
    model = get_peft_model(tiny_llama(), SpftConfig(salience_memory_gib=GIB_OF_TWO_MATRICES, **options))
    with pytest.raises(SpftError, match=r"would take .* passes, but"):
        select_mask(model, BATCHES)
