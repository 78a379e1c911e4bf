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
    # one rank looks and all do as it found: a file system may show the others another state for a while
    name, error = ranks.from_first(lambda: _find(cfg, ranks.world, engine))
    if error:
        raise SpftError(error)
    if name:
        cfg.resume_from_checkpoint = name
        if ranks.sum_numbers(int(Path(name, ADAPTER_FILE).is_file()))[0] < ranks.world:
            raise SpftError(f"{name} is not there on every node: write checkpoints to a folder that all nodes see")
    return name


def _find(cfg: Any, world: int, engine: str) -> tuple[str | None, str | None]:
    """The checkpoint to resume from, or what is wrong with it."""
    from axolotl.utils.train import determine_last_checkpoint

    try:
        if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
            _set_incomplete_aside(Path(cfg.output_dir))
        name = determine_last_checkpoint(cfg)
        if name:
            _check(Path(name), world, engine)
    except (SpftError, OSError) as error:
        return None, str(error)
    return name or None, None


def _check(checkpoint: Path, world: int, engine: str) -> None:
    problems = problems_of_checkpoint(checkpoint)
    if problems:
        raise SpftError(
            f"{checkpoint} is not a complete checkpoint to resume from ({'; '.join(problems)}): name a complete one in "
            "`resume_from_checkpoint`, or delete this folder"
        )
    made_by = _recorded_run(checkpoint)
    if made_by and made_by != {"world": world, "engine": engine}:
        raise SpftError(
            f"{checkpoint} was made by {made_by['world']} ranks under {made_by['engine']}, but this run has "
            f"{world} under {engine}: start it as it was, or leave `resume_from_checkpoint` and "
            f"`auto_resume_from_checkpoints` out and set `lora_model_dir: {checkpoint}` to go on from its values with "
            "a new optimizer state"
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


def _set_incomplete_aside(output_dir: Path) -> None:
    """Rename every ``checkpoint-<step>`` that a crash left incomplete to ``incomplete-checkpoint-<step>``."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        problems = problems_of_checkpoint(checkpoint) if checkpoint.name.split("-")[-1].isdigit() else []
        if problems and any(
            (checkpoint / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
        ):
            raise SpftError(
                f"{checkpoint} is a whole model's checkpoint, not a sparse adapter's: set another `output_dir`, or "
                "leave `auto_resume_from_checkpoints` out"
            )
        if problems:
            aside, number = checkpoint.with_name(f"incomplete-{checkpoint.name}"), 1
            while aside.exists():
                number += 1
                aside = checkpoint.with_name(f"incomplete-{checkpoint.name}.{number}")
            checkpoint.rename(aside)
            LOG.warning("Checkpoint %s is incomplete (%s): renamed to %s", checkpoint, "; ".join(problems), aside.name)
