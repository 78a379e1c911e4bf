"""Every metric against its textbook definition in float64, and the masks against a full sort."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.metrics import METRICS
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import NEEDS, load_metric
from axolotl_spft.salience.sample_pass import collect_statistics
from axolotl_spft.salience.scores import scorer
from tests.models import ARCHITECTURES, token_batch
from tests.salience.metrics.cases import TESTED
from tests.salience.metrics.textbook import Textbook, packed, rows_of
from tests.salience.test_select import sorted_top_k
from tests.tuner.test_quantized import dequantized, quantize

LIFT_RANK = 5
WEIGHTLESS = ("random",)
# relative to the largest score; the gradient of an 8-bit base is that of inputs rounded to 8 bits
TOLERANCE = {"float": 1e-4, "4bit": 2e-4, "8bit": 2e-2}
# a difference instead of a derivative
OF_GRASP = {"float": 1e-3, "4bit": 5e-3, "8bit": 2e-2}
# through the attention's keys flows a small difference of large sums, and processors round these differently
OF_SYNFLOW = TOLERANCE | {"float": 5e-4}


def sample() -> list:
    padded = token_batch(rows=3)
    padded["labels"] = padded["labels"].clone()
    padded["labels"][1, 6:] = -100
    padded["attention_mask"] = (padded["labels"] != -100).long()
    return [(batch, rows_of(batch)) for batch in (padded, token_batch(rows=2, length=7, seed=1))] + [packed((5, 9, 4))]


def base_of(architecture: str, base: str, attention: str = "eager"):
    model = ARCHITECTURES[architecture]()
    model.config._attn_implementation = attention
    return model if base == "float" else quantize(model, base)


@functools.cache
def found(architecture: str, base: str, attention: str = "eager"):
    """The layers, what one pass finds for all metrics, and the textbook."""
    model = base_of(architecture, base, attention)
    plain = model if base == "float" else dequantized(model)
    model = get_peft_model(model, SpftConfig(density=0.03)).train()
    layers, batches = adapted_layers(model), [batch for batch, _ in sample()]
    collected = collect_statistics(model, layers, NEEDS, batches, None, 100, Ranks())
    textbook = ARCHITECTURES[architecture]() if base == "float" else plain
    return layers, collected, Textbook(textbook.train(), list(layers), sample())


def scores(metric: str, *case: str) -> list[torch.Tensor]:
    layers, collected, _ = found(*case)
    score = scorer(load_metric(metric), layers, collected.sums, Ranks(), seed=3, lift_rank=LIFT_RANK)
    return [score(index) for index in range(len(layers))]


def check(metric: str, *case: str) -> None:
    layers, _, textbook = found(*case)
    tolerance = {"grasp": OF_GRASP, "synflow": OF_SYNFLOW}.get(metric, TOLERANCE)[case[1]]
    expected = textbook.score(metric, LIFT_RANK)
    assert any(each.abs().max() > 0 for each in expected)
    for name, got, want in zip(layers, scores(metric, *case), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= tolerance * want.abs().max(), name


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in WEIGHTLESS])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_scores_are_those_of_the_textbook(architecture, metric):
    check(metric, architecture, "float")


@pytest.mark.parametrize(
    ("metric", "base"),
    [(m, b) for m, b, engine in TESTED if engine == "one process" and b != "float" and m not in WEIGHTLESS],
)
def test_on_a_quantized_base_they_are_those_of_the_dequantized_model(metric, base):
    check(metric, "llama", base)


@pytest.mark.parametrize(
    ("metric", "base"), [(m, b) for m, b, engine in TESTED if engine == "one process" and m in WEIGHTLESS]
)
def test_random_knows_the_seed_and_the_layer_alone(metric, base):
    for index, got in enumerate(scores(metric, "llama", base)):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + index)
        assert torch.equal(got, torch.rand(got.shape, generator=generator))


def test_the_report_says_how_the_hessian_was_multiplied():
    # a fused attention has no second derivative, and a quantized layer is a function of its library's own
    ways = {case: found("llama", *case)[1].notes["hessian"] for case in (("float", "eager"), ("4bit", "eager"))}
    assert list(ways.values()) == ["double backward", "central difference"]
    config = SpftConfig(density=0.03, salience="grasp", samples=3)
    model = get_peft_model(base_of("llama", "float", "sdpa"), config)
    assert "hessian central difference" in str(select_mask(model, iter([token_batch(rows=3)])))
    assert model.peft_config["default"].mask_source["hessian"] == "central difference"


def test_the_difference_is_near_the_derivative():
    layers, collected, textbook = found("llama", "float", "sdpa")
    assert collected.notes["hessian"] == "central difference"
    for name, want in zip(layers, textbook.hessian_gradients()):
        got = collected.sums["hessian_gradient"][name]
        assert (got - want).abs().max() <= 5e-3 * want.abs().max(), name


@pytest.mark.parametrize("metric", METRICS)
def test_masks_are_those_of_a_full_sort(metric):
    config = SpftConfig(density=0.03, salience=metric, samples=100, seed=3, lift_rank=LIFT_RANK)
    model = get_peft_model(base_of("llama", "float"), config).train()
    select_mask(model, [batch for batch, _ in sample()])
    for layer, score in zip(adapted_layers(model).values(), scores(metric, "llama", "float")):
        mask = layer.mask("default")
        expected = sorted_top_k([score], mask.nnz)[0]
        assert positions(mask, layer.in_features).tolist() == expected.tolist()


def test_padding_does_not_count_among_the_inputs():
    layers, collected, textbook = found("llama", "float")
    seen = {}
    handle = [
        textbook.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, 1))
        )
        for name in layers
    ]
    for _, examples in sample():
        for example in examples:
            kept = example["labels"].shape[1]
            if "attention_mask" in example:
                kept = int(example["attention_mask"].sum())
            textbook.model(**{k: v[:, :kept] if torch.is_tensor(v) else v for k, v in example.items()})
    for each in handle:
        each.remove()
    for name in layers:
        want = sum(x.square().sum(0) for x in seen[name])
        torch.testing.assert_close(collected.sums["input_squares"][name].double(), want, rtol=1e-4, atol=1e-5)
