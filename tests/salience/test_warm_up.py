"""The throw-away warm-up before the salience is computed."""

from __future__ import annotations

import random

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience.install import adapted_layers
from tests.models import ARCHITECTURES, same_weights, tiny_llama, token_batch, weights_of

BATCHES = [token_batch(rows=2, seed=seed) for seed in range(5)]
RATE = 0.02


def chosen(model) -> list[list[int]]:
    return [positions(layer.mask("default"), layer.in_features).tolist() for layer in adapted_layers(model).values()]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("salience", ["gradient", "snip", "magnitude"])
def test_the_mask_is_that_of_the_weights_after_these_steps(architecture, salience):
    options = {"density": 0.05, "samples": 6, "seed": 3}
    model = get_peft_model(ARCHITECTURES[architecture](), SpftConfig(salience=salience, score_after=2, **options))
    select_mask(model, BATCHES, learning_rate=RATE)
    # trained as a run of its own, merged, and scored
    trained = get_peft_model(ARCHITECTURES[architecture](), SpftConfig(salience="random", **options))
    select_mask(trained, None)
    optimizer = SparseAdamW([p for p in trained.parameters() if p.requires_grad], lr=RATE)
    for batch in BATCHES[:2]:
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = get_peft_model(trained.merge_and_unload(), SpftConfig(salience=salience, **options))
    select_mask(expected, BATCHES)
    plain = get_peft_model(ARCHITECTURES[architecture](), SpftConfig(salience=salience, **options))
    select_mask(plain, BATCHES)
    assert chosen(model) != chosen(plain)
    got, wanted = ({(i, at) for i, places in enumerate(chosen(each)) for at in places} for each in (model, expected))
    # rounding may exchange a few at the threshold
    assert len(got) == len(wanted) and len(got - wanted) <= 0.005 * len(got)


def test_nothing_of_it_stays():
    model = get_peft_model(
        tiny_llama(attention_dropout=0.5), SpftConfig(score_after=2, samples=2, modules_to_save=["lm_head"])
    )
    model.train()
    before = weights_of(model.base_model.model.model.embed_tokens), weights_of(tiny_llama(attention_dropout=0.5))
    random.seed(1), torch.manual_seed(3)
    expected = random.random(), torch.rand(3).tolist()
    random.seed(1), torch.manual_seed(3)
    select_mask(model, BATCHES, learning_rate=RATE)
    assert (random.random(), torch.rand(3).tolist()) == expected
    assert all(p.grad is None for p in model.parameters())
    assert same_weights(model.base_model.model.model.embed_tokens, before[0])
    values = [layer.spft_values["default"] for layer in adapted_layers(model).values()]
    assert all(each.requires_grad and not each.any() for each in values if each.numel())
    assert same_weights(model.unload(), before[1])


def failing(call: int, error: BaseException):
    """A loss that ends in ``error`` at its so-many-th call."""
    calls = iter(range(1, call + 1))

    def loss(model, batch):
        if next(calls) == call:
            raise error
        return model(**batch).loss

    return loss


@pytest.mark.parametrize("call", [2, 4], ids=["in the warm-up", "in the pass after it"])
@pytest.mark.parametrize("error", [RuntimeError("no loss"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
def test_an_error_leaves_an_empty_adapter_that_can_be_filled_again(call, error):
    options = {"density": 0.05, "score_after": 2, "samples": 4}
    model = get_peft_model(tiny_llama(), SpftConfig(**options))
    layers = adapted_layers(model).values()
    before = [layer.spft_values["default"] for layer in layers]
    with pytest.raises(type(error), match=str(error)):
        select_mask(model, BATCHES, failing(call, error), learning_rate=RATE)
    assert all(layer.mask("default").nnz == 0 == layer.spft_values["default"].numel() for layer in layers)
    # an optimizer that was made before the mask trains them still
    assert all(layer.spft_values["default"] is values for layer, values in zip(layers, before))
    assert all(values.requires_grad for values in before)
    select_mask(model, BATCHES, learning_rate=RATE)
    undisturbed = get_peft_model(tiny_llama(), SpftConfig(**options))
    select_mask(undisturbed, BATCHES, learning_rate=RATE)
    assert chosen(model) == chosen(undisturbed)
    assert all(layer.spft_values["default"] is values for layer, values in zip(layers, before) if values.numel())


def test_an_iterator_is_read_again_from_its_first_batch():
    masks = []
    for batches in (BATCHES, iter(BATCHES)):
        # more steps than there are batches
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, score_after=7, samples=10))
        report = select_mask(model, batches, learning_rate=RATE)
        assert report.samples == 10 and "score_after 7" in str(report)
        masks.append(chosen(model))
    assert masks[0] == masks[1]


@pytest.mark.parametrize(
    ("options", "batches", "rate", "part"),
    [
        ({}, BATCHES, None, "`score_after: 2` trains at the run's learning rate: pass `learning_rate`"),
        ({"salience": "magnitude"}, None, RATE, "`score_after: 2` trains on batches: give some"),
        ({}, [], RATE, "`score_after: 2` found no batches"),
        ({"salience": "synflow"}, BATCHES, RATE, "no meaning with `salience: synflow`"),
    ],
)
def test_what_it_cannot_do_is_said_first(options, batches, rate, part):
    model = get_peft_model(tiny_llama(), SpftConfig(score_after=2, **options))
    with pytest.raises(SpftError, match=part):
        select_mask(model, batches, learning_rate=rate)
