"""The figures beside the logged loss, against dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.watch import Watch
from axolotl_spft.tuner.step_unit import squares_of_weights
from tests.models import tiny_gpt2, tiny_llama, token_batch
from tests.trainer.test_callback import plain
from tests.tuner.test_quantized import quantize


def dense(model, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """W and S of all matrices of a name, flat, in float64."""
    layers = [layer for name, layer in adapted_layers(model).items() if name.endswith(module)]
    weights = torch.cat([layer.get_base_weight().double().flatten() for layer in layers])
    return weights, torch.cat([layer.get_delta_weight("default").double().flatten() for layer in layers])


@pytest.mark.parametrize("kind", ["llama in bfloat16", "gpt2", "llama in 4 bits"])
def test_the_figures_are_those_of_the_dense_matrices(kind):
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama(torch.bfloat16 if "bfloat16" in kind else torch.float32)
    if "4 bits" in kind:
        model = quantize(model, "4bit")
    model = get_peft_model(model, SpftConfig(density=0.1))
    model.peft_config["default"].salience = "random"
    select_mask(model, None)
    watch = Watch(model, Ranks(), squares_of_weights(adapted_layers(model)))
    at_zero = watch.figures()
    assert at_zero["spft/values_norm"] == 0
    # around what bfloat16 can tell apart near these weights
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.spft_values["default"].normal_(std=1e-4 if "bfloat16" in kind else 1e-8)
    model(**token_batch())  # the base weights hold W + S now
    found = watch.figures()
    names = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert set(found) == {"spft/values_norm", *(f"spft/delta_over_weight/{name}" for name in names)} | (
        set() if "4 bits" in kind else {"spft/rounded_away"}
    )
    squares = 0.0
    for name in names:
        weights, deltas = dense(model, name)
        squares += float(deltas.square().sum())
        expected = float(deltas.norm() / weights.norm())
        assert found[f"spft/delta_over_weight/{name}"] == pytest.approx(expected, rel=1e-5)
    assert found["spft/values_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    if "4 bits" not in kind:
        lost = total = 0
        for layer in adapted_layers(model).values():
            weight = layer.get_base_weight()
            sums = (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
            at = layer.get_delta_weight("default") != 0
            lost, total = lost + int((sums == weight)[at].sum()), total + int(at.sum())
        assert 0.05 < found["spft/rounded_away"] < 0.95
        assert found["spft/rounded_away"] == pytest.approx(lost / total, abs=1e-3)


class Elsewhere:
    """Positions on a device where the weight is not: only a copy of them can be used."""

    def __init__(self, positions: torch.Tensor):
        self.positions = positions

    def to(self, device: torch.device) -> torch.Tensor:
        return self.positions.to(device)


def test_weights_that_wait_on_another_device_are_read_there(monkeypatch):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.1, salience="random"))
    select_mask(model, None)
    layers = adapted_layers(model)
    watch = Watch(model, Ranks(), squares_of_weights(layers))
    expected = watch.figures()
    for layer in layers.values():
        layer.stored_weight.data = layer.stored_weight.data.cpu()
    kind = type(next(iter(layers.values())))
    positions = kind.storage_positions
    monkeypatch.setattr(kind, "storage_positions", lambda *args: Elsewhere(positions(*args)))
    assert "spft/rounded_away" in expected and watch.figures() == expected


def test_the_trainer_logs_them_with_the_loss_alone(tmp_path):
    trainer = plain(tmp_path)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    norms = [entry["spft/values_norm"] for entry in steps]
    assert 0 < norms[0] < norms[1]
    assert all("spft/rounded_away" in entry and "spft/delta_over_weight/q_proj" in entry for entry in steps)
    assert not any(name.startswith("spft/") for name in trainer.state.log_history[-1])
