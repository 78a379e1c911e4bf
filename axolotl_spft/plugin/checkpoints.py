"""Checkpoints to resume from: complete ones only, from a run on as many ranks and the same engine."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.files import check_safetensors

LOG = get_logger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"


class RunRecord(TrainerCallback, ExportableState):
    """Records in every checkpoint's ``trainer_state.json`` how many ranks and which engine made it."""

    def __init__(self, world: int, engine: str):
        self.world, self.engine = world, engine

    def state(self) -> dict[str, Any]:
        return {"args": {"world": self.world, "engine": self.engine}, "attributes": {}}


def checkpoint_to_resume(cfg: Any, ranks: Ranks, engine: str) -> str | None:
    """The checkpoint that Axolotl is about to resume from, if it resumes.

    With ``auto_resume_from_checkpoints`` the incomplete checkpoints of an interrupted run are renamed out of the way
    first, the newest complete one is taken.

    Raises:
        SpftError: the checkpoint that ``resume_from_checkpoint`` names is not complete, or the run that made it had
            another number of ranks or another engine.
    """
    from axolotl.utils.train import determine_last_checkpoint

    automatic = cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None
    if automatic:
        if ranks.rank == 0:
            _set_incomplete_aside(Path(cfg.output_dir))
        ranks.wait()
    name = determine_last_checkpoint(cfg)
    if not name:
        return None
    checkpoint = Path(name)
    problems = problems_of_checkpoint(checkpoint)
    if problems:
        raise SpftError(
            f"{checkpoint} is not a complete checkpoint to resume from ({'; '.join(problems)}): name a complete one in "
            "`resume_from_checkpoint`, or delete this folder"
        )
    made_by = _recorded_run(checkpoint)
    if made_by and made_by != {"world": ranks.world, "engine": engine}:
        raise SpftError(
            f"{checkpoint} was made by {made_by['world']} ranks under {made_by['engine']}, but this run has "
            f"{ranks.world} under {engine}: start it as it was, or leave `resume_from_checkpoint` and "
            f"`auto_resume_from_checkpoints` out and set `lora_model_dir: {checkpoint}` to go on from its values with "
            "a new optimizer state"
        )
    return name


def problems_of_checkpoint(checkpoint: Path) -> list[str]:
    """What a checkpoint folder lacks to be resumed from; empty when it is complete."""
    problems = [f"{name} is missing" for name in _expected_files(checkpoint) if not (checkpoint / name).is_file()]
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                check_safetensors(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                problems.append(f"{path.relative_to(checkpoint)} is cut off")
        except (SpftFileError, ValueError):
            problems.append(f"{path.relative_to(checkpoint)} is cut off")
    return problems


def _expected_files(checkpoint: Path) -> list[str]:
    expected = ["adapter_config.json", ADAPTER_FILE, "scheduler.pt", "trainer_state.json"]
    made_by = _recorded_run(checkpoint)
    if made_by and made_by["world"] > 1:
        expected += [f"rng_state_{rank}.pth" for rank in range(made_by["world"])]
    elif made_by:
        expected.append("rng_state.pth")
    # DeepSpeed writes `latest` when all ranks have written their parts
    expected.append("latest" if any(checkpoint.glob("global_step*")) else "optimizer.pt")
    return expected


def _recorded_run(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("stateful_callbacks", {}).get(RunRecord.__name__, {}).get("args")


def _set_incomplete_aside(output_dir: Path) -> None:
    """Rename every incomplete ``checkpoint-<step>`` to ``incomplete-checkpoint-<step>``."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        problems = problems_of_checkpoint(checkpoint) if checkpoint.name.split("-")[-1].isdigit() else []
        if problems:
            aside, number = checkpoint.with_name(f"incomplete-{checkpoint.name}"), 1
            while aside.exists():
                number += 1
                aside = checkpoint.with_name(f"incomplete-{checkpoint.name}.{number}")
            checkpoint.rename(aside)
            LOG.warning("Checkpoint %s is incomplete (%s): renamed to %s", checkpoint, "; ".join(problems), aside.name)
