"""A trainer whose mask changes: checkpoints from any moment lead to the same bits, and what is logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from axolotl_spft import DynamicMask, SpftCallback, SpftConfig
from axolotl_spft.dynamic.history import FILE, History
from axolotl_spft.errors import SpftError
from axolotl_spft.inspection.inspect import inspect_files
from axolotl_spft.inspection.text import describe
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.salience_pass import peft_model_of
from axolotl_spft.tuner.state import slots_of
from tests.experts import PARAMETERS, tiny_mixtral
from tests.models import tiny_llama
from tests.trainer.test_callback import plain
from tests.tuner.test_embedding import tied_qwen2

RESELECT = {"every": 2, "fraction": 0.3, "until": 0.9, "collect": 2}
RUN = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


def trainer_of(
    folder: Path, reselect: dict | None = RESELECT, optimizer: str | None = "sparse_adamw", base=tiny_llama,
    targets: dict | None = None, **changes,
):  # fmt: skip
    model = get_peft_model(base(), SpftConfig(density=0.05, samples=4, reselect=reselect, **(targets or {})))
    trainer = plain(folder, model, [SpftCallback(optimizer)])
    for name, value in (RUN | changes).items():
        setattr(trainer.args, name, value)
    return trainer


def end_of(folder: Path, step: int = 7) -> tuple[dict, dict, list]:
    """Tensors of a checkpoint: the adapter's with the history's, the optimizer's; and what was logged."""
    path = folder / f"checkpoint-{step}"
    tensors = load_file(path / "adapter_model.safetensors") | load_file(path / FILE)
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    state = {
        f"{number} {name}": tensor for number, entry in optimizer["state"].items() for name, tensor in entry.items()
    }
    state |= {name: str(entry) for name, entry in optimizer["param_groups"][0].items()}
    log = json.loads((path / "trainer_state.json").read_text())["log_history"]
    told = [{name: each[name] for name in each if name == "loss" or name.startswith("spft/")} for each in log]
    return tensors, state, told


def assert_same(one, other) -> None:
    for mine, yours in zip(one[:2], other[:2]):
        assert mine.keys() == yours.keys()
        for key in mine:
            same = (
                torch.equal(mine[key], yours[key]) if isinstance(mine[key], torch.Tensor) else mine[key] == yours[key]
            )
            assert same, key
    assert one[2] == other[2]


@pytest.mark.parametrize("optimizer", ["sparse_adamw", "sparse_adamw_8bit"])
def test_resumed_before_at_after_and_amid_a_reselection_equals_uninterrupted(tmp_path, optimizer, monkeypatch):
    whole = trainer_of(tmp_path / "run", optimizer=optimizer)
    whole.train()
    expected = end_of(tmp_path / "run")
    layers = adapted_layers(peft_model_of(whole))
    # after 2, 4 and 6 of 7 steps
    turnover = [entry.get("spft/turnover") for entry in expected[2] if "loss" in entry]
    assert turnover[0] is None and all(0.25 < each <= 0.3 for each in turnover[1:])
    assert [entry.get("spft/mean_age") for entry in expected[2]][1] == pytest.approx(2 * (1 - turnover[1]))
    assert slots_of(layers, "default") == whole.optimizer_cls_and_kwargs[1]["slots"]
    firsts = [load_file(tmp_path / "run" / f"checkpoint-{step}" / FILE) for step in (1, 7)]
    for key in firsts[0]:
        assert key.endswith("begun") or torch.equal(firsts[0][key], firsts[1][key])
    masks = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2, 3, 7)]
    key = "base_model.model.model.layers.0.mlp.up_proj.spft_columns"
    one, two, three, seven = (mask[key].int().tolist() for mask in masks)
    assert one != two == three != seven

    for step in (3, 4) if optimizer == "sparse_adamw" else (2,):
        again = trainer_of(tmp_path / "run", optimizer=optimizer)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same(end_of(tmp_path / "run"), expected)

    # dies among the matrices of the second re-selection
    calls, move = [], History.move

    def die(self, *args):
        calls.append(args)
        if len(calls) == len(layers) + 5:
            raise KeyboardInterrupt
        move(self, *args)

    monkeypatch.setattr(History, "move", die)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "dies", optimizer=optimizer).train()
    monkeypatch.setattr(History, "move", move)
    assert not (tmp_path / "dies" / "checkpoint-4").exists()
    trainer_of(tmp_path / "dies", optimizer=optimizer).train(resume_from_checkpoint=True)
    assert_same(end_of(tmp_path / "dies"), expected)


@pytest.mark.parametrize("reselect", [None, RESELECT], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_tied_targets_and_experts_resume_to_the_same_bits(tmp_path, kind, reselect):
    base, targets = {
        "tied": (tied_qwen2, {"target_modules": ["lm_head", "q_proj"], "bias": "all"}),
        "experts": (tiny_mixtral, {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}),
    }[kind]
    options = {"base": base, "targets": targets, "max_steps": 4}
    trainer_of(tmp_path, reselect, **options).train()
    expected, first = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 1))
    moved = [key for key in expected if not torch.equal(expected[key], first[key])]
    assert {"spft_values"} <= {key.rpartition(".")[2] for key in moved}
    assert any(key.endswith("spft_columns") for key in moved) == (reselect is not None)
    optimizer = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    trainer_of(tmp_path, reselect, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert state.keys() == optimizer["state"].keys()
    for number, entry in state.items():
        assert all(torch.equal(entry[key], optimizer["state"][number][key]) for key in entry)


def test_a_fraction_of_nothing_is_the_static_run_and_inspect_tells_what_was_recorded(tmp_path):
    static = trainer_of(tmp_path / "static", None, save_steps=7)
    static.train()
    nothing = trainer_of(tmp_path / "nothing", {"every": 1, "fraction": 0}, save_steps=7)
    nothing.train()
    one, other = (
        load_file(tmp_path / name / "checkpoint-7/adapter_model.safetensors") for name in ("static", "nothing")
    )
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (static, nothing)]
    assert losses[0] == losses[1]
    changing = trainer_of(
        tmp_path / "changing", {"every": 3, "drop": "value_gradient"}, "sparse_adamw_8bit", save_steps=7
    )
    changing.train()
    told = describe(inspect_files([tmp_path / "changing" / "checkpoint-7"])).splitlines()[0]
    assert "reselections 1, last re-selection after step 3, turnover 0.1" in told
    assert "of the first mask 0.8" in told and "mean age 2." in told
    assert "reselections" not in describe(inspect_files([tmp_path / "static" / "checkpoint-7"]))
    # its file of the mask's history belongs to a checkpoint
    (tmp_path / "changing" / "checkpoint-7" / FILE).unlink()
    with pytest.raises(SpftError, match=f"not a complete checkpoint to resume from .{FILE} is missing"):
        trainer_of(tmp_path / "changing").train(resume_from_checkpoint=True)


def test_a_static_runs_checkpoint_goes_on_with_a_dynamic_mask(tmp_path):
    trainer_of(tmp_path, None, save_steps=3).train()
    dynamic = trainer_of(tmp_path, {"every": 5, "until": 1.0}, save_steps=7)
    dynamic.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    masks = [load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 7)]
    assert any(not torch.equal(masks[0][key].int(), masks[1][key].int()) for key in masks[0] if "columns" in key)
    first = load_file(tmp_path / "checkpoint-7" / FILE)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(first[f"{name}.first_columns"].int(), masks[0][f"base_model.model.{name}.spft_columns"].int())


def test_what_cannot_work_is_told_before_the_salience_pass(tmp_path):
    for reselect, changes, said in (
        ({"every": 2, "collect": 3}, {}, "`reselect.collect: 3` is more than the 2 micro-batches"),
        ({"every": 2}, {"torch_compile": True}, "leave `torch_compile` out"),
        ({"every": 2}, {"optim": "adafactor"}, "`adafactor` has not: use sparse_adamw"),
    ):
        trainer = trainer_of(tmp_path, reselect, None, **changes)
        with pytest.raises(SpftError, match=said):
            trainer.train()
        assert not any(layer.mask("default").nnz for layer in adapted_layers(peft_model_of(trainer)).values())
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience="tests.salience.metrics.own:by_inputs",
                                                    reselect={"every": 2}))  # fmt: skip
    with pytest.raises(SpftError, match="`reselect` grows where the salience of the training's own gradients"):
        plain(tmp_path, model).train()
    with pytest.raises(SpftError, match=r"has no mask that could change: call select_mask\(\) first"):
        DynamicMask(get_peft_model(tiny_llama(), SpftConfig(density=0.05)))
