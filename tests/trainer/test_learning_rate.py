"""`relative_step`: the trainer's learning rate in units of rms(W) (0.005 / density)^0.75."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from axolotl_spft import SpftCallback, SpftConfig, SpftError, select_mask, step_unit
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.learning_rate import absolute_learning_rate
from axolotl_spft.tuner.step_unit import squares_of_weights
from tests.models import tiny_gpt2, tiny_llama
from tests.trainer.test_callback import assert_same, figures, plain
from tests.tuner.test_quantized import quantize


def adapted(relative_step: bool, **options):
    return get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=4, relative_step=relative_step, **options))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "4bit"])
def test_the_unit_is_rms_of_the_targeted_weights_without_s_and_falls_with_density(kind):
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama(torch.bfloat16)
    if kind == "4bit":
        model = quantize(tiny_llama(), "4bit")
    model = get_peft_model(model, SpftConfig(density=0.5, salience="random"))
    select_mask(model, [{"input_ids": torch.arange(8).view(1, 8)}] * 2)
    weights = torch.cat([layer.read_weight().double().flatten() for layer in adapted_layers(model).values()])
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.spft_values["default"].fill_(3.0)
    model(torch.arange(8).view(1, 8))  # base weights that can hold W + S do now
    # at a hundred times the density of the formula's
    assert step_unit(model) == pytest.approx(float(weights.square().mean().sqrt()) * 100**-0.75, rel=1e-5)
    assert step_unit(model) == float(f"{step_unit(model):.6g}")


def test_a_relative_rate_trains_as_the_absolute_one(tmp_path):
    model = adapted(True)
    unit = step_unit(model)
    trainer = plain(tmp_path / "relative", model)
    trainer.args.learning_rate = 0.25
    trainer.train()
    absolute = plain(tmp_path / "absolute", adapted(False))
    absolute.args.learning_rate = 0.25 * unit
    absolute.train()
    assert figures(trainer)[2].any()
    assert_same(figures(trainer), figures(absolute))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(0.25 * unit)


def first_rate(trainer) -> float:
    return next(entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry)


def test_the_arguments_of_one_run_serve_another(tmp_path):
    arguments = plain(tmp_path).args
    arguments.learning_rate = 0.25
    for _ in range(2):
        model = adapted(True, modules_to_save=["lm_head"])
        trainer = plain(tmp_path, model)
        trainer.args = arguments
        trainer.train()
        assert first_rate(trainer) == pytest.approx(0.25 * step_unit(model))
    assert arguments.learning_rate == 0.25


def test_a_pass_that_was_interrupted_has_not_changed_the_rate(tmp_path):
    class Interrupted(Trainer):
        calls = count(1)

        def compute_loss(self, *args, **kwargs):
            if next(self.calls) == 1:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model, other = adapted(True), plain(tmp_path)
    trainer = Interrupted(model, other.args, train_dataset=other.train_dataset, callbacks=[SpftCallback()])
    trainer.args.learning_rate = 0.25
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert first_rate(trainer) == pytest.approx(0.25 * step_unit(model))


def test_the_warm_up_before_the_mask_has_the_relative_rate_too(tmp_path):
    # a rate of 0.25 instead of some 0.005 would move the weights out of all proportion
    trainers = []
    for relative in (True, False):
        model = adapted(relative, score_after=2)
        trainer = plain(tmp_path / str(relative), model)
        trainer.args.learning_rate = 0.25 if relative else 0.25 * step_unit(model)
        trainer.train()
        trainers.append(trainer)
    relative, absolute = (adapted_layers(trainer.model) for trainer in trainers)
    assert all(
        torch.equal(relative[name].mask("default").columns, absolute[name].mask("default").columns) for name in relative
    )


def test_the_rate_is_told_in_units_of_rms(tmp_path, capsys):
    trainer = plain(tmp_path)
    trainer.args.learning_rate = 0.5 * step_unit(trainer.model)
    trainer.train()
    assert f"= 0.5 x {step_unit(trainer.model):g} (rms(W) (0.005 / density)^0.75)" in capsys.readouterr().out


def test_an_optimizer_with_a_rate_of_its_own_is_refused(tmp_path):
    trainer = plain(tmp_path, adapted(True), [SpftCallback()], optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-3}))
    with pytest.raises(SpftError, match=r"`relative_step` sets the trainer's .* axolotl_spft\.step_unit\(model\)"):
        trainer.train()


def test_a_schedule_of_deepspeeds_file_has_a_rate_of_its_own(tmp_path):
    trainer = plain(tmp_path, adapted(True))
    trainer.args.hf_deepspeed_config = HfTrainerDeepSpeedConfig({"scheduler": {"type": "WarmupLR"}})
    layers = adapted_layers(trainer.model)
    with pytest.raises(SpftError, match=r'the DeepSpeed file has a "scheduler" of its own'):
        absolute_learning_rate(
            trainer, trainer.model.peft_config["default"], layers, squares_of_weights(layers), lambda _: None
        )


def test_weights_that_cannot_be_read_have_no_rms():
    model = adapted(True)
    for layer in adapted_layers(model).values():
        layer.quantization_backend = _NoInverse()
    with pytest.raises(SpftError, match=r"rms\(W\) is not known"):
        step_unit(model)


class _NoInverse:
    supports_merge = False
