"""The checkpoint that Axolotl's keys ask to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.trainer.checkpoints import ADAPTER_FILE, check_checkpoint, problems_of_checkpoint

LOG = get_logger(__name__)


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
            check_checkpoint(
                Path(name),
                world,
                engine,
                "leave `resume_from_checkpoint` and `auto_resume_from_checkpoints` out and set "
                f"`lora_model_dir: {name}` to go on from its values with a new optimizer state",
            )
    except (SpftError, OSError) as error:
        return None, str(error)
    return name or None, None


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
