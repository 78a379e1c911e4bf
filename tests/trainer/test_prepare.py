"""A preparation that ends late: the trainer is as before, and can be tried again."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from axolotl_spft import SpftConfig, step_unit
from axolotl_spft.trainer import prepare
from axolotl_spft.trainer.checkpoints import RunRecord
from tests.models import tiny_llama
from tests.trainer.test_callback import assert_same, figures, plain
from tests.trainer.test_learning_rate import first_rate

OPTIONS = {"density": 0.05, "samples": 4, "relative_step": True, "reselect": {"every": 1, "until": 1.0}}


def trainer_of(folder):
    trainer = plain(folder, get_peft_model(tiny_llama(), SpftConfig(**OPTIONS)))
    trainer.args.learning_rate = 0.25
    return trainer


def interrupted(function, after):
    """The function, interrupted before it starts or after its end."""

    def call(*args, **kwargs):
        if after:
            function(*args, **kwargs)
        raise KeyboardInterrupt

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return figures(trainer)


@pytest.mark.parametrize(
    "step, after", [("watch_training", False), ("add_reselections", True), ("keep_section_of_card", True)]
)
def test_interrupted_late_it_can_be_tried_again(tmp_path, monkeypatch, whole, step, after):
    trainer = trainer_of(tmp_path)
    attributes, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    arguments = dict(vars(trainer.args))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, step, interrupted(getattr(prepare, step), after))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert trainer.args is attributes["args"] and vars(trainer.args) == arguments
    assert vars(trainer).keys() == attributes.keys()
    assert [name for name, value in attributes.items() if callable(value) and vars(trainer)[name] is not value] == []
    assert trainer.optimizer_cls_and_kwargs is None
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert first_rate(trainer) == pytest.approx(0.25 * step_unit(trainer.model))
    assert sum(isinstance(each, RunRecord) for each in trainer.callback_handler.callbacks) == 1
    assert_same(figures(trainer), whole)
