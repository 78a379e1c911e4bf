"""Which checkpoints can be resumed from, by what their folders hold."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.checkpoints import checkpoint_to_resume
from axolotl_spft.trainer.checkpoints import RunRecord, problems_of_checkpoint


def make_checkpoint(folder, step: int, engine: str = "single", world: int = 1):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(4)}, checkpoint / "adapter_model.safetensors")
    record = {RunRecord.__name__: RunRecord(world, engine).state()}
    (checkpoint / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": record}))
    for rank in range(world):
        torch.save(torch.ones(3), checkpoint / ("rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"))
    if engine.startswith("zero"):
        (checkpoint / "latest").write_text(f"global_step{step}")
        (checkpoint / f"global_step{step}").mkdir()
        torch.save(torch.ones(3), checkpoint / f"global_step{step}" / "mp_rank_00_model_states.pt")
        for rank in range(world):
            name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save(torch.ones(1000), checkpoint / f"global_step{step}" / name)
    else:
        torch.save(torch.ones(1000), checkpoint / "optimizer.pt")
        torch.save(torch.ones(3), checkpoint / "scheduler.pt")
    return checkpoint


def config(folder, **changes):
    keys = {"output_dir": str(folder), "auto_resume_from_checkpoints": True, "resume_from_checkpoint": None}
    return SimpleNamespace(**(keys | changes))


@pytest.mark.parametrize(("engine", "world"), [("single", 1), ("ddp", 2), ("zero1", 2), ("zero3", 1)])
def test_complete_checkpoints_are_complete(tmp_path, engine, world):
    # DeepSpeed writes no scheduler.pt where the schedule is its own
    assert problems_of_checkpoint(make_checkpoint(tmp_path, 2, engine, world)) == []


def zeros_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)


DAMAGES = {
    "adapter_model.safetensors is cut off": lambda c: (c / "adapter_model.safetensors").write_bytes(b"abc"),
    "trainer_state.json is missing": lambda c: (c / "trainer_state.json").unlink(),
    "rng_state_1.pth is missing": lambda c: (c / "rng_state_1.pth").unlink(),
    "latest is missing": lambda c: (c / "latest").write_text(""),
    "global_step9 is missing": lambda c: (c / "latest").write_text("global_step9"),
    "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt is missing": lambda c: (
        c / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    ).unlink(),
    "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt is cut off": lambda c: zeros_in_the_middle(
        c / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    ),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_torn_checkpoints_are_seen(tmp_path, problem):
    checkpoint = make_checkpoint(tmp_path, 2, "zero2", 2)
    DAMAGES[problem](checkpoint)
    assert problem in problems_of_checkpoint(checkpoint)


def test_the_newest_complete_one_is_taken_and_torn_ones_are_set_aside(tmp_path):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 10)
    torn = make_checkpoint(tmp_path, 12)
    (torn / "scheduler.pt").unlink()
    cfg = config(tmp_path)
    assert checkpoint_to_resume(cfg, Ranks(), "single") == cfg.resume_from_checkpoint == str(tmp_path / "checkpoint-10")
    assert (tmp_path / "incomplete-checkpoint-12").is_dir()
    shutil.rmtree(tmp_path / "checkpoint-10")
    (make_checkpoint(tmp_path, 12) / "scheduler.pt").unlink()
    assert checkpoint_to_resume(config(tmp_path), Ranks(), "single") == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "incomplete-checkpoint-12.2").is_dir()


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert checkpoint_to_resume(config(tmp_path), Ranks(), "single") is None
    make_checkpoint(tmp_path, 2)
    assert checkpoint_to_resume(config(tmp_path, auto_resume_from_checkpoints=False), Ranks(), "single") is None


def test_a_whole_models_checkpoint_is_left_alone(tmp_path):
    other = tmp_path / "checkpoint-5"
    other.mkdir()
    save_file({"x": torch.ones(4)}, other / "model.safetensors")
    with pytest.raises(SpftError, match=r"is a whole model's checkpoint.*another `output_dir`"):
        checkpoint_to_resume(config(tmp_path), Ranks(), "single")
    assert other.is_dir()


def test_another_engine_or_world_is_refused_with_the_remedy(tmp_path):
    made = make_checkpoint(tmp_path, 2, "ddp", 2)
    with pytest.raises(SpftError, match=r"made by 2 ranks under ddp, but this run has 1 under single.*`lora_model_dir"):
        checkpoint_to_resume(config(tmp_path, resume_from_checkpoint=str(made)), Ranks(), "single")
