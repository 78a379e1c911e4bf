"""Checkpoints that a run can resume from: complete ones, from a run on as many ranks and the same engine."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from axolotl_spft.dynamic.history import FILE
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.files import check_safetensors

ADAPTER_FILE = "adapter_model.safetensors"


class RunRecord(TrainerCallback, ExportableState):
    """Records in every checkpoint's ``trainer_state.json`` how many ranks and which engine made it.

    Args:
        reselects: whether the run's mask changes, of which its checkpoints hold a file more.
    """

    def __init__(self, world: int, engine: str, reselects: bool = False):
        self.world, self.engine, self.reselects = world, engine, reselects

    def state(self) -> dict[str, Any]:
        return {
            "args": {"world": self.world, "engine": self.engine, "reselects": self.reselects},
            "attributes": {},
        }


def check_checkpoint(checkpoint: Path, world: int, engine: str, remedy: str) -> None:
    """Check that a run on ``world`` ranks under ``engine`` can resume from a checkpoint.

    Args:
        engine: of `engine_of`.
        remedy: how to go on from the values of a checkpoint that another kind of run made.

    Raises:
        SpftError: it is not complete, or the run that made it had another number of ranks or another engine.
    """
    problems = problems_of_checkpoint(checkpoint)
    if problems:
        raise SpftError(
            f"{checkpoint} is not a complete checkpoint to resume from ({'; '.join(problems)}): name a complete one in "
            "`resume_from_checkpoint`, or delete this folder"
        )
    made_by = _recorded_run(checkpoint)
    if made_by and (made_by["world"], made_by["engine"]) != (world, engine):
        raise SpftError(
            f"{checkpoint} was made by {made_by['world']} ranks under {made_by['engine']}, but this run has "
            f"{world} under {engine}: start it as it was, or {remedy}"
        )


def problems_of_checkpoint(checkpoint: Path) -> list[str]:
    """What a checkpoint folder lacks to be resumed from; empty when it is complete."""
    problems = [f"{name} is missing" for name in _missing_files(checkpoint)]
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                check_safetensors(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth"):
                # reads everything: a machine that loses power can leave zeros in a file of the right length
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise ValueError
        except (SpftFileError, ValueError, zipfile.BadZipFile):
            problems.append(f"{path.relative_to(checkpoint)} is cut off")
    return problems


def _missing_files(checkpoint: Path) -> list[str]:
    # the trainer writes its state last, when all ranks have written theirs
    expected = ["adapter_config.json", ADAPTER_FILE, "trainer_state.json"]
    made_by = _recorded_run(checkpoint)
    world = made_by["world"] if made_by else 1
    if world > 1:
        expected += [f"rng_state_{rank}.pth" for rank in range(world)]
    elif made_by:
        expected.append("rng_state.pth")
    by_deepspeed = any(checkpoint.glob("global_step*"))
    if not by_deepspeed:
        # with DeepSpeed a schedule of its own is in its files
        expected += ["optimizer.pt", "scheduler.pt"]
    if made_by and made_by.get("reselects"):
        expected.append(FILE)
    missing = [name for name in expected if not (checkpoint / name).is_file()]
    return missing + (_missing_of_deepspeed(checkpoint, world) if by_deepspeed else [])


def _missing_of_deepspeed(checkpoint: Path, world: int) -> list[str]:
    latest = checkpoint / "latest"
    tag = latest.read_text().strip() if latest.is_file() else ""
    if not tag or not (checkpoint / tag).is_dir():
        return [tag or "latest"]
    parts = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)]
    # with a prefix where DeepSpeed's optimizer is the one for bf16
    return [f"{tag}/{part}" for part in parts if not any((checkpoint / tag).glob(f"*{part}"))]


def _recorded_run(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("stateful_callbacks", {}).get(RunRecord.__name__, {}).get("args")
