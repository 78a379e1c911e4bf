"""A trainer that has begun, and goes on from a checkpoint: to the bits of a new trainer."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from axolotl_spft import SpftCallback, SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.trainer import resume
from tests.models import tiny_llama
from tests.trainer.test_callback import plain
from tests.trainer.test_reselection import assert_same, end_of, trainer_of


class Interrupt(TrainerCallback):
    """Raises what Ctrl-C raises, once, within a step."""

    def __init__(self, step: int):
        self.left = [step]

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step in self.left:
            self.left.remove(state.global_step)
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["sparse_adamw", None])
def test_an_interrupted_run_with_a_changing_mask_goes_on_in_the_same_trainer(tmp_path, optimizer):
    reselect = {"every": 1, "fraction": 0.3, "until": 0.9, "collect": 2}
    trainer_of(tmp_path / "whole", reselect, optimizer, max_steps=5).train()
    expected = end_of(tmp_path / "whole", 5)
    trainer = trainer_of(tmp_path / "run", reselect, optimizer, max_steps=5, save_steps=3)
    # with gradients collected for the re-selection after step 5, and the mask of step 4
    trainer.add_callback(Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert_same(end_of(tmp_path / "run", 5), expected)


def static(folder, seed: int, optimizer="sparse_adamw", max_steps: int = 2):
    config = SpftConfig(density=0.002, samples=4, scope="global", seed=seed, salience="random" if seed else "gradient")
    trainer = plain(folder, get_peft_model(tiny_llama(), config), [SpftCallback(optimizer)])
    trainer.args.save_strategy, trainer.args.save_steps, trainer.args.max_steps = "steps", 1, max_steps
    return trainer


def trained(folder) -> tuple[dict, list]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    told = [{name: each[name] for name in each if name == "loss" or name.startswith("spft/")} for each in log]
    return load_file(folder / "adapter_model.safetensors"), told


@pytest.mark.parametrize("make", [static, partial(static, optimizer=None)], ids=["sparse_adamw", "the trainer's own"])
def test_it_goes_on_from_a_checkpoint_of_another_mask(tmp_path, make, capsys):
    # some layers are without entries in the one mask, or in the other
    make(tmp_path, 0).train()
    expected = trained(tmp_path / "checkpoint-2")
    trainer = make(tmp_path / "other", 9)
    trainer.train()
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    found = trained(tmp_path / "other" / "checkpoint-2")
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][key], expected[0][key]) for key in found[0])
    assert found[1] == expected[1]
    assert f"Sparse mask: the one of the checkpoint {tmp_path}/checkpoint-1" in capsys.readouterr().out


def test_deepspeeds_engine_keeps_its_mask(tmp_path, monkeypatch):
    def adapted(seed: int):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience="random", seed=seed))
        select_mask(model, None)
        return model

    one, other = adapted(1), adapted(2)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    trainer = plain(tmp_path, one)
    monkeypatch.setattr(resume, "engine_of", lambda accelerator: "zero2")
    resume.resume_begun(trainer, str(tmp_path / "one"), True, print)
    with pytest.raises(SpftError, match=r"has another mask than the model now.*make the model and the trainer anew"):
        resume.resume_begun(trainer, str(tmp_path / "other"), True, print)
