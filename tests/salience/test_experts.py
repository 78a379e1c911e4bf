"""The choice of positions in experts whose weights are one parameter."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.metrics import METRICS
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.ops.weight.stacked import as_matrix
from axolotl_spft.plugin.salience_rules import problems_of_salience
from axolotl_spft.salience.install import adapted_layers
from tests.experts import EXPERT_MODELS, IDLE, N_EXPERTS, PARAMETERS, tiny_gpt_oss, tiny_mixtral
from tests.models import token_batch, weights_of

BATCHES = [token_batch(rows=3, seed=1), token_batch(rows=2, seed=2)]
REFUSED = {"fisher": "no longer tell whose tokens", "grasp": "twice, and these experts", "synflow": "one token through"}


def chosen(make, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model with its mask, and the positions in each matrix."""
    config = {"density": 0.05, "samples": 5, "target_modules": ["q_proj"], "target_parameters": PARAMETERS} | options
    model = get_peft_model(make(), SpftConfig(**config))
    start = weights_of(model)
    select_mask(model, BATCHES, learning_rate=1e-2)
    assert all(torch.equal(weights_of(model)[name], w) for name, w in start.items() if "spft" not in name)
    layers = adapted_layers(model)
    return model, {name: positions(layer.mask("default"), layer.in_features) for name, layer in layers.items()}


def dense_scores(make, metric: str) -> dict[str, torch.Tensor]:
    """Of every targeted weight, by autograd of the dense model."""
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 3 or "q_proj.weight" in name)
    for batch in BATCHES:
        model(**batch).loss.backward()
    scores = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            transposed = parameter.ndim == 3 and make is tiny_gpt_oss
            gradient, weight = (as_matrix(each, transposed) for each in (parameter.grad, parameter.detach()))
            scores[name.removesuffix(".weight")] = {
                "gradient": gradient.abs(),
                "magnitude": weight.abs(),
                "snip": (weight * gradient).abs(),
            }[metric]
    return scores


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("scope", ["layer", "global", "row"])
def test_the_choice_is_a_full_sort_of_the_dense_gradient(family, scope):
    make = EXPERT_MODELS[family]
    _, found = chosen(make, scope=scope)
    scores = dense_scores(make, "gradient")
    assert found.keys() == scores.keys()
    if scope == "global":
        flat = torch.cat([scores[name].flatten() for name in found])
        top = flat.argsort(descending=True, stable=True)[: sum(map(len, found.values()))].sort().values
        starts = torch.tensor([0, *(scores[name].numel() for name in found)]).cumsum(0)
        for name, first, last in zip(found, starts, starts[1:]):
            assert torch.equal(found[name], top[(top >= first) & (top < last)] - first), name
    for name, at in found.items() if scope != "global" else ():
        score = scores[name]
        if scope == "row":
            counts = torch.bincount(at // score.shape[1], minlength=score.shape[0])
            parts = [row.argsort(descending=True, stable=True)[:k].sort().values + i * score.shape[1]
                     for i, (row, k) in enumerate(zip(score, counts))]  # fmt: skip
            assert torch.equal(at, torch.cat(parts)), name
        else:
            assert torch.equal(at, score.flatten().argsort(descending=True, stable=True)[: len(at)].sort().values)
            assert "experts" not in name or (at >= score.numel() // N_EXPERTS * (IDLE + 1)).all()


@pytest.mark.parametrize("metric", list(METRICS))
def test_every_metric_scores_experts_or_says_why_not(metric):
    if metric in REFUSED:
        with pytest.raises(
            SpftError, match=rf"`salience: {metric}` .*{REFUSED[metric]}.*leave `target_parameters` out"
        ):
            chosen(tiny_mixtral, salience=metric)
        (problem,) = problems_of_salience({}, {"salience": metric, "target_parameters": PARAMETERS})
        assert REFUSED[metric] in problem
        return
    assert problems_of_salience({}, {"salience": metric, "target_parameters": PARAMETERS}) == []
    _, found = chosen(tiny_gpt_oss, salience=metric)
    assert all(len(at) for at in found.values())
    if metric in ("magnitude", "snip"):
        for name, score in dense_scores(tiny_gpt_oss, metric).items():
            assert torch.equal(found[name], score.flatten().argsort(descending=True)[: len(found[name])].sort().values)


@pytest.mark.parametrize("memory_gib", [None, 1e-9])
def test_experts_that_no_token_comes_to_are_told(memory_gib):
    config = SpftConfig(target_parameters=PARAMETERS, samples=5, salience_memory_gib=memory_gib)
    model = get_peft_model(tiny_mixtral(), config)
    with pytest.warns(UserWarning, match="no token of the sample came to"):
        report = select_mask(model, BATCHES)
    (note,) = report.notes
    names = [name for name in adapted_layers(model) if ".experts." in name]
    assert all(f"1 of the 5 experts in {name}" in note for name in names[:3]) and report.untrained == ()


def test_densities_by_pattern_a_warm_up_and_passes_in_groups():
    pattern = {r"experts\.gate_up_proj": 0.2}
    model, found = chosen(tiny_mixtral, density_pattern=pattern, score_after=2)
    layers = adapted_layers(model)
    for name, at in found.items():
        share = len(at) / (layers[name].out_features * layers[name].in_features)
        assert share == pytest.approx(0.2 if "gate_up" in name else 0.05, abs=2e-3), name
    _, at_once = chosen(tiny_mixtral)
    _, in_groups = chosen(tiny_mixtral, salience_memory_gib=1e-9)
    assert all(torch.equal(at, in_groups[name]) for name, at in at_once.items())
    _, checkpointed = chosen(lambda: _checkpointed(tiny_mixtral()))
    assert all(torch.equal(at, checkpointed[name]) for name, at in at_once.items())


def _checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


def test_a_mask_of_experts_is_saved_and_used_again(tmp_path):
    path = str(tmp_path / "mask.safetensors")
    _, first = chosen(tiny_gpt_oss, mask_path=path)
    _, again = chosen(tiny_gpt_oss, mask_path=path)
    assert first.keys() == again.keys() and all(torch.equal(at, again[name]) for name, at in first.items())
