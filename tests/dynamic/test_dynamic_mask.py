"""A mask that changes while it is trained: the definition, what stays, what is put back."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft import DynamicMask, SparseAdamW
from axolotl_spft.errors import SpftConfigError, SpftError, SpftFileError
from axolotl_spft.metrics import METRICS, ON_THE_WAY
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.reselect_rules import Reselect
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import load_metric
from axolotl_spft.tuner.record import record_from_tensor
from axolotl_spft.tuner.state import shapes_of
from tests.dynamic.runs import MaskedDense, adapted, masks_of, micro_batches, optimizer_of, train, values_of
from tests.engine.test_ranks import LiveBytes
from tests.models import ARCHITECTURES, same_weights, tiny_gpt2, tiny_llama, tiny_moe, token_batch, weights_of
from tests.tuner.test_quantized import dequantized, quantize

STEPS, EVERY = 12, 3


def in_four_bits(model: nn.Module) -> nn.Module:
    """As transformers quantizes it: GPT-2's transposed layers become linear ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight.data.copy_(module.weight.t())
            linear.bias.data.copy_(module.bias)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], linear)
    return quantize(model, "4bit")


@pytest.mark.parametrize(
    ("architecture", "base", "scope", "collect", "drop", "fraction"),
    [
        ("llama", "float", "layer", 2, "value", 0.25),
        ("gpt2", "float", "global", 1, "value_gradient", 0.25),
        ("llama", "4bit", "row", 1, "value", 0.5),
        ("gpt2", "4bit", "layer", 2, "value_gradient", 0.25),
    ],
)
def test_equals_masked_dense_training_with_the_same_schedule(architecture, base, scope, collect, drop, fraction):
    pretrained = ARCHITECTURES[architecture]()
    if base == "4bit":
        pretrained = in_four_bits(pretrained)
    dense = dequantized(pretrained)
    model = adapted(pretrained, scope=scope)
    reference = MaskedDense(dense, masks_of(model), fraction, scope == "row", drop)
    first = masks_of(model)
    losses, _ = train(model, optimizer_of(model), STEPS, EVERY, collect, fraction=fraction, drop=drop)
    expected = reference.train(STEPS, EVERY, collect)
    assert losses == pytest.approx(expected, rel=1e-5)
    masks = masks_of(model)
    changed = 0
    for name, layer in adapted_layers(model).items():
        assert torch.equal(masks[name], reference.masks[name]), name
        delta = layer.get_delta_weight("default")
        assert (delta - reference.deltas[name]).abs().max() <= 1e-5 * reference.start[name].abs().max()
        changed += int((masks[name] & ~first[name]).sum())
    assert changed > 0.2 * values_of(model).numel()


def test_counts_stay_over_fifty_reselections_and_dropped_weights_are_the_pretrained_ones():
    model = adapted(tiny_llama())
    start, first = weights_of(model.base_model.model), masks_of(model)
    optimizer = optimizer_of(model)
    parameters = [layer.spft_values["default"] for layer in adapted_layers(model).values()]
    _, dynamic = train(model, optimizer, 50, 1, accumulate=1, fraction=0.3)
    masks, ever = masks_of(model), 0
    assert [int(mask.sum()) for mask in masks.values()] == [int(mask.sum()) for mask in first.values()]
    # the parameters that the optimizer holds
    assert all(layer.spft_values["default"] is p for layer, p in zip(adapted_layers(model).values(), parameters))
    assert dynamic.history.figures.step == 50
    # what the mask left is W again, to the bit
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, mask in masks.items():
        weight = start[f"{name}.base_layer.weight"]
        assert torch.equal(merged[f"{name}.weight"][~mask], weight[~mask])
        assert not torch.equal(merged[f"{name}.weight"], weight)
        ever += int((first[name] & ~mask).sum())
    assert ever > 0.3 * sum(int(mask.sum()) for mask in masks.values())
    values = {name for name in start if "spft" in name}
    now = weights_of(model.base_model.model)
    assert all(torch.equal(now[name], start[name]) for name in start.keys() - values)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_fraction_of_nothing_changes_no_bit(state_bits):
    static, dynamic = (adapted(tiny_llama()) for _ in range(2))
    optimizers = [optimizer_of(model, state_bits) for model in (static, dynamic)]
    losses, _ = train(static, optimizers[0], 6)
    others, mask = train(dynamic, optimizers[1], 6, 2, fraction=0)
    assert losses == others
    assert mask.history.figures.turnover == 0
    assert same_weights(dynamic, weights_of(static))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])


def test_kept_values_keep_their_moments_and_grown_ones_begin_anew():
    model = adapted(tiny_llama())
    optimizer = optimizer_of(model)
    _, dynamic = train(model, optimizer, 3, 4, fraction=0.5)
    layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
    parameter = layer.spft_values["default"]
    with dynamic.collecting():
        model(**token_batch(seed=5)).loss.backward()
    optimizer.step()

    def by_position() -> dict:
        state, at = optimizer.state[parameter], positions(layer.mask("default"), layer.in_features)
        return dict(zip(at.tolist(), zip(*(t.tolist() for t in (parameter, state["exp_avg"], state["exp_avg_sq"])))))

    before = by_position()
    dynamic.reselect(optimizer, 4)
    after = by_position()
    kept = before.keys() & after.keys()
    assert len(kept) == len(before) - len(before) // 2
    assert {at: after[at] for at in kept} == {at: before[at] for at in kept}
    assert all(after[at] == (0, 0, 0) for at in after.keys() - kept)
    dropped = [abs(before[at][0]) for at in before.keys() - kept]
    assert max(dropped) <= min(abs(before[at][0]) for at in kept)
    assert optimizer.state[parameter]["step"] == 4


@pytest.mark.parametrize("kind", ["8bit", "bf16", "torch", "sgd"])
def test_other_optimizers_states_follow(kind):
    model = adapted(tiny_llama(torch.bfloat16) if kind == "bf16" else tiny_llama())
    if kind == "bf16":
        for layer in adapted_layers(model).values():
            layer.spft_values.to(torch.bfloat16)
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = {
        "8bit": lambda: SparseAdamW(values, lr=1e-2, state_bits=8),
        "bf16": lambda: SparseAdamW(values, lr=1e-2),
        "torch": lambda: torch.optim.AdamW(values, lr=1e-2, amsgrad=True),
        "sgd": lambda: torch.optim.SGD(values, lr=1e-2, momentum=0.9),
    }[kind]()
    _, dynamic = train(model, optimizer, 12, 3, fraction=0.4)
    for name, layer in dynamic.layers.items():
        parameter = layer.spft_values["default"]
        state = optimizer.state[parameter]
        young = dynamic.history.begun[name] == 12
        assert 0 < young.sum() < young.numel()
        assert not parameter[young].any()
        names = {"8bit": (), "bf16": ("master", "exp_avg", "exp_avg_sq"),
                 "torch": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "sgd": ("momentum_buffer",)}[kind]  # fmt: skip
        for key in names:
            assert not state[key][young].any() and state[key][~young].all(), key
        if kind == "bf16":
            assert torch.equal(state["master"].bfloat16(), parameter)


def test_moments_in_eight_bits_stay_near_those_of_before():
    from axolotl_spft.optim.moments import MOMENTS, absmax_name, read_moment

    model = adapted(tiny_llama())
    optimizer = optimizer_of(model, 8)
    _, dynamic = train(model, optimizer, 3, 4, fraction=0.3)
    name, layer = "model.layers.0.mlp.down_proj", adapted_layers(model)["model.layers.0.mlp.down_proj"]
    parameter = layer.spft_values["default"]

    def moments():
        state = optimizer.state[parameter]
        return [read_moment(each, state[each], state[absmax_name(each)]).clone() for each in MOMENTS]

    with dynamic.collecting():
        model(**token_batch(seed=5)).loss.backward()
    optimizer.step()
    before, at = moments(), positions(layer.mask("default"), layer.in_features)
    dynamic.reselect(optimizer, 4)
    now = positions(layer.mask("default"), layer.in_features)
    kept = torch.isin(now, at)
    for old, new in zip(before, moments()):
        assert torch.count_nonzero(new[~kept]) == 0
        assert (new[kept] - old[torch.isin(at, now)]).abs().max() <= 0.02 * old.abs().max()
    assert (~kept).any() and name in dynamic.layers


def test_the_record_and_the_figures_tell_turnover_overlap_and_age():
    model = adapted(tiny_llama())
    _, dynamic = train(model, optimizer_of(model), 6, 2, fraction=0.2)
    figures, first, now = dynamic.history.figures, dynamic.history.first, masks_of(model)
    values = values_of(model).numel()
    grown = sum(int((begun == 6).sum()) for begun in dynamic.history.begun.values())
    assert figures.turnover == grown / values
    held = sum(
        int(now[name].view(-1)[positions(first[name], layer.in_features)].sum())
        for name, layer in adapted_layers(model).items()
    )
    assert figures.first_mask == held / values
    ages = torch.cat([6 - begun for begun in dynamic.history.begun.values()])
    assert figures.mean_age == pytest.approx(ages.double().mean().item())
    assert 0 < figures.mean_age < 6
    source = record_from_tensor(model.base_model.spft_record["default"])["mask_source"]
    assert source["reselections"] == 3 and source["salience"] == "gradient"
    assert source["of the first mask"] == pytest.approx(figures.first_mask, abs=1e-4)
    assert model.peft_config["default"].mask_source == source


def test_the_saliences_that_can_be_computed_on_the_way_are_those_of_gradient_and_weight():
    needs = {name: load_metric(name).needs for name in METRICS}
    on_the_way = [name for name, each in needs.items() if "gradient" in each and each <= {"gradient", "weight"}]
    assert list(ON_THE_WAY) == on_the_way
    for name in ("snip", "balanced"):
        model = adapted(tiny_llama(), salience=name)
        first = masks_of(model)
        train(model, optimizer_of(model), 2, 2, fraction=0.2)
        assert any(not torch.equal(mask, first[layer]) for layer, mask in masks_of(model).items())


def test_re_selections_are_due_at_every_so_many_steps_up_to_a_share_and_never_last():
    assert [step for step in range(1, 13) if Reselect(2, until=0.75).is_due(step, 12)] == [2, 4, 6, 8]
    assert [step for step in range(1, 13) if Reselect(3, until=1).is_due(step, 12)] == [3, 6, 9]


def test_what_is_saved_beside_the_adapter_goes_on(tmp_path):
    model = adapted(tiny_llama())
    _, dynamic = train(model, optimizer_of(model), 4, 2, fraction=0.2)
    dynamic.save(tmp_path)
    other = DynamicMask(model)
    other.load(tmp_path)
    assert other.history.figures == dynamic.history.figures
    for name in dynamic.layers:
        assert torch.equal(other.history.begun[name], dynamic.history.begun[name])
        assert all(torch.equal(*pair) for pair in zip(other.history.first[name], dynamic.history.first[name]))
    with pytest.raises(SpftFileError, match=r"belongs to another run .*resume from an intact checkpoint"):
        DynamicMask(adapted(tiny_llama(), density=0.05)).load(tmp_path)


def test_checkpointing_repeated_layers_and_frozen_ones():
    """Recomputed passes are counted once, a layer that runs twice twice, and one that is not trained keeps its mask."""
    plain, recomputed = (adapted(tiny_llama()) for _ in range(2))
    recomputed.enable_input_require_grads()
    recomputed.gradient_checkpointing_enable({"use_reentrant": True})
    again = adapted(tiny_llama())
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, recomputed, again):
        train(model, optimizer_of(model), 4, 2, fraction=0.3)
    assert all(torch.equal(values_of(plain), values_of(model)) for model in (recomputed, again))

    model = adapted(tiny_moe())
    before = masks_of(model)
    dynamic, optimizer = DynamicMask(model, fraction=0.3), optimizer_of(model)
    with dynamic.collecting():
        model.base_model.model.model.layers[0].mlp.shared_expert.requires_grad_(False)
        (model(**token_batch(seed=3)).loss + model(**token_batch(seed=4)).loss).backward()
    name = "model.layers.1.self_attn.q_proj"
    assert len(dynamic.collector._pairs[name]) == 2
    optimizer.step()
    shapes = set(shapes_of(dynamic.layers).values())
    with LiveBytes(shapes, [*model.parameters()]) as tracker:
        dynamic.reselect(optimizer, 1)
    sizes = [4 * rows * columns for rows, columns in shapes_of(dynamic.layers).values()]
    # the gradient, its score, and what both are made and checked with
    assert 0 < tracker.peak <= 6 * max(sizes) < sum(sizes)
    dense = dense_gradient(tiny_moe(), f"{name}.weight", 3, 4)
    check_grown(before[name], masks_of(model)[name], dense, 0.3)
    frozen = "model.layers.0.mlp.shared_expert.up_proj"
    assert torch.equal(masks_of(model)[frozen], before[frozen])


def dense_gradient(model: nn.Module, name: str, *seeds: int) -> torch.Tensor:
    for seed in seeds:
        model(**token_batch(seed=seed)).loss.backward()
    return model.get_parameter(name).grad


def check_grown(before: torch.Tensor, after: torch.Tensor, dense: torch.Tensor, fraction: float) -> None:
    """What was grown is what a full sort of the gradient outside of the mask begins with."""
    grown = (after & ~before).view(-1).nonzero().squeeze(1)
    assert len(grown) == int(fraction * before.sum())
    score = torch.where(before, -torch.inf, dense.abs()).view(-1)
    assert torch.equal(grown, score.sort(descending=True, stable=True).indices[: len(grown)].sort().values)


def test_a_tied_embedding_grows_by_the_gradient_of_both_of_its_uses():
    base = tiny_llama(tie_word_embeddings=True)
    model = adapted(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    before, (name, layer) = masks_of(model), next(iter(adapted_layers(model).items()))
    assert layer.readers and name == "model.embed_tokens"
    dynamic, optimizer = DynamicMask(model, fraction=0.4), optimizer_of(model)
    with dynamic.collecting():
        model(**token_batch(seed=3)).loss.backward()
    optimizer.step()
    dynamic.reselect(optimizer, 1)
    dense = dense_gradient(tiny_llama(tie_word_embeddings=True), f"{name}.weight", 3)
    check_grown(before[name], masks_of(model)[name], dense, 0.4)
    model(**token_batch(seed=3)).loss.backward()
    assert torch.isfinite(layer.spft_values["default"].grad).all()


def test_mistakes_are_told_in_a_sentence():
    model = adapted(tiny_gpt2())
    dynamic, optimizer = DynamicMask(model), optimizer_of(model)
    with pytest.raises(SpftError, match="no gradients were collected: run the forward"):
        dynamic.reselect(optimizer, 1)
    with dynamic.collecting():
        model(**token_batch()).loss.backward()
    with pytest.raises(SpftError, match="the optimizer does not hold the values"):
        dynamic.reselect(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), 1)
    odd = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad])
    odd.step()
    with pytest.raises(SpftError, match="Adagrad keeps `sum` for the values, which does not follow"):
        dynamic.reselect(odd, 1)
    model.merge_adapter()
    with pytest.raises(SpftError, match="while an adapter is merged"):
        dynamic.reselect(optimizer, 1)
    model.unmerge_adapter()
    with pytest.raises(SpftConfigError, match=r"`reselect.fraction: 2` must be a number in \[0, 1\]"):
        DynamicMask(model, fraction=2)
    with pytest.raises(SpftConfigError, match="`salience: random` is not made of these"):
        DynamicMask(adapted(tiny_llama(), salience="random"))
    with pytest.raises(SpftConfigError, match="tear the blocks of `pattern: block`"):
        DynamicMask(adapted(tiny_llama(), pattern="block", block_size=[4, 5]))
    dynamic.reselect(optimizer, 1)
    with dynamic.collecting():
        model(**token_batch()).loss.backward()
    later = SimpleNamespace(optimizer=optimizer, single_partition_of_fp32_groups=[])
    with pytest.raises(SpftError, match=r"DeepSpeed [\d.]+ does not keep the values' optimizer state where"):
        dynamic.reselect(later, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    layer = next(iter(dynamic.layers.values()))
    layer.set_mask("default", layer.mask("default"))
    model(**micro_batches(1, 1)[0]).loss.backward()
    with pytest.raises(SpftError, match="belong to positions of before another mask"):
        optimizer.step(), optimizer.step()
        layer.set_mask("default", layer.mask("default"))
        optimizer.step()
