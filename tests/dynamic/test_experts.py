"""A mask of experts that changes while it is trained: the definition, recomputed passes, what else a run holds."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft import DynamicMask
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.state import shapes_of
from tests.dynamic.runs import MaskedDense, adapted, masks_of, optimizer_of, train, values_of
from tests.engine.test_ranks import LiveBytes
from tests.experts import EXPERT_MODELS, PARAMETERS
from tests.models import same_weights, token_batch, weights_of

STEPS, EVERY = 6, 2
# of which the grouped products take rows
WIDE = {"hidden_size": 32, "moe_intermediate_size": 24}
TARGETS = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}


def matrices_of(model) -> dict:
    return {name: layer for name, layer in adapted_layers(model).items() if "experts" in name}


@pytest.mark.parametrize(
    ("family", "implementation", "sizes", "scope", "collect", "drop", "fraction"),
    [
        ("mixtral", "eager", {}, "layer", 2, "value", 0.25),
        ("gpt_oss", "eager", {}, "row", 1, "value_gradient", 0.5),
        ("qwen3_moe", "grouped_mm", WIDE, "global", 2, "value", 0.25),
    ],
)
def test_equals_masked_dense_training_with_the_same_schedule(
    family, implementation, sizes, scope, collect, drop, fraction
):
    make = EXPERT_MODELS[family]
    model = adapted(make(implementation, **sizes), scope=scope, **TARGETS)
    first = masks_of(model)
    reference = MaskedDense(make(implementation, **sizes), first, fraction, scope == "row", drop)
    losses, dynamic = train(model, optimizer_of(model), STEPS, EVERY, collect, fraction=fraction, drop=drop)
    assert losses == pytest.approx(reference.train(STEPS, EVERY, collect), rel=1e-5)
    masks = masks_of(model)
    assert len(matrices_of(model)) == 4
    for name, layer in adapted_layers(model).items():
        assert torch.equal(masks[name], reference.masks[name]), name
        assert (masks[name] & ~first[name]).any()
        delta = layer.get_delta_weight("default")
        assert (delta - reference.deltas[name]).abs().max() <= 1e-5 * reference.start[name].abs().max()
    assert dynamic.history.figures.turnover > 0.2


def test_one_dense_gradient_at_a_time_and_no_other_trace():
    model = adapted(EXPERT_MODELS["mixtral"](), **TARGETS)
    dynamic, optimizer = DynamicMask(model, fraction=0.3), optimizer_of(model)
    for seed in (3, 4):
        with dynamic.collecting():
            model(**token_batch(seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = values_of(model)
    frozen = {name: tensor for name, tensor in weights_of(model).items() if "spft" not in name}
    names = set(matrices_of(model))
    shapes = {shape for name, shape in shapes_of(dynamic.layers).items() if name in names}
    with LiveBytes(shapes, [*model.parameters()]) as tracker:
        dynamic.reselect(optimizer, 1)
    sizes = [4 * rows * columns for rows, columns in shapes_of(matrices_of(model)).values()]
    # the gradient, its score, and what both are made and checked with
    assert 0 < tracker.peak <= 6 * max(sizes)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weights_of(model)[name], tensor) for name, tensor in frozen.items())
    # those that stay have the values of after the step
    after = values_of(model)
    assert torch.isin(after[after != 0], before).all() and (after == 0).sum() > (before == 0).sum()


def test_recomputed_passes_are_counted_once_and_frozen_experts_keep_their_mask():
    plain, recomputed, again = (adapted(EXPERT_MODELS["mixtral"](), **TARGETS) for _ in range(3))
    recomputed.enable_input_require_grads()
    recomputed.gradient_checkpointing_enable({"use_reentrant": True})
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, recomputed, again):
        train(model, optimizer_of(model), 4, 2, fraction=0.3)
    assert same_weights(recomputed, weights_of(plain)) and same_weights(again, weights_of(plain))
    before, frozen = masks_of(plain), "model.layers.1.mlp.experts.down_proj"
    adapted_layers(plain)[frozen].requires_grad_(False)
    train(plain, optimizer_of(plain), 2, 1, fraction=0.3)
    after = masks_of(plain)
    assert {name for name in before if torch.equal(before[name], after[name])} == {frozen}
