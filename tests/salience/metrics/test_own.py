"""`salience: package.module:function`."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.metrics import METRICS
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import load_metric
from axolotl_spft.salience.metrics.statistics import Statistics
from tests.models import same_weights, tiny_llama, token_batch, weights_of
from tests.salience.metrics import own
from tests.salience.test_orchestrate import chosen

OWN = "tests.salience.metrics.own"


def masked(salience: str, **options):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=2, salience=salience, **options))
    select_mask(model, [token_batch()])
    return model


def test_a_function_without_needs_gets_the_gradient():
    assert chosen(masked(f"{OWN}:plain")) == chosen(masked("gradient"))


def test_a_function_of_weights_and_inputs():
    model = masked(f"{OWN}:by_inputs")
    base, inputs = tiny_llama(), {}
    for name in adapted_layers(model):
        base.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: inputs.update({name: args[0]}))
    base(**token_batch())
    for name, got in chosen(model).items():
        weight = base.get_submodule(name).weight.detach()
        score = weight.abs() * inputs[name].detach().flatten(0, 1).norm(dim=0)
        expected = score.flatten().topk(len(got)).indices.sort().values.tolist()
        assert len(set(got) ^ set(expected)) <= 2, name


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_shape", r"gave \(36, 50\): return a tensor of shape \(50, 36\)"),
        ("not_finite", "is not finite everywhere"),
        ("raises", "failed: KeyError: 'another'"),
        ("no_tensor", "gave NoneType"),
        ("undeclared", "the score reads `weight` without declaring it: write `@needs"),
    ],
)
def test_a_function_that_fails_is_one_error_that_changes_nothing(function, said, tmp_path):
    base = tiny_llama()
    before = weights_of(base)
    options = {"mask_path": str(tmp_path / "mask.safetensors"), "density": 0.03, "samples": 2}
    model = get_peft_model(base, SpftConfig(salience=f"{OWN}:{function}", **options))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(SpftError, match=f"`salience: {OWN}:{function}` of {own.BROKEN_LAYER}:? {said}"):
        select_mask(model, [token_batch()])
    assert torch.equal(torch.rand(3), expected)
    assert list(tmp_path.iterdir()) == []
    assert all(layer.mask("default").nnz == 0 for layer in adapted_layers(model).values())
    assert model.peft_config["default"].mask_source is None
    assert same_weights(model.unload(), before)


@pytest.mark.parametrize(
    ("salience", "said"),
    [
        ("no.such.module:score", "cannot be imported .ModuleNotFoundError: No module named 'no'.: write `package"),
        (f"{OWN}:no_such_function", "cannot be imported .AttributeError"),
        (f"{OWN}:not_callable", "is no function"),
        (f"{OWN}:unknown_need", "needs momentum, which the pass does not know: declare some of gradient, "),
    ],
)
def test_what_is_no_metric_is_found_before_the_pass(salience, said):
    model = get_peft_model(tiny_llama(), SpftConfig(salience=salience))
    with pytest.raises(SpftError, match=f"`salience: {salience}` {said}"):
        select_mask(model, [token_batch()], lambda *_: pytest.fail("the pass ran"))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_declares_all_that_it_reads(name):
    """Without any of its needs a metric names one of them."""
    metric = load_metric(name)
    if metric.needs:
        with pytest.raises(SpftError, match="without declaring it"):
            metric.score(Statistics((3, 4)))


def test_a_weight_that_cannot_be_read_is_refused_before_the_pass(monkeypatch):
    from axolotl_spft.tuner.layer import SpftLinear

    model = get_peft_model(tiny_llama(), SpftConfig(salience="snip"))
    for layer in adapted_layers(model).values():
        layer.quantization_backend = type("Backend", (), {"backend_name": "GPTQ", "supports_merge": False})()
    assert isinstance(layer, SpftLinear) and layer.forward_only
    with pytest.raises(SpftError, match="`salience: snip` reads the weights, and a GPTQ layer's cannot be read"):
        select_mask(model, [token_batch()], lambda *_: pytest.fail("the pass ran"))
