"""One training, written down for every engine: the same global batch, mask, seed and steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.engines.workspace import write_config

RANKS = 2
ENGINES = ("ddp", "zero1", "zero2", "zero3")
BASES: dict[str, dict[str, Any]] = {"float": {}, "4bit": {"load_in_4bit": True}}
STEPS = 6

_SHIPPED = Path(__file__).parents[1] / "deepspeed"
_TRAINING: dict[str, Any] = {
    "spft": {"density": 0.05, "samples": 16},
    "micro_batch_size": 2,
    "max_steps": STEPS,
    "save_steps": 2,
    # low enough that every step is clipped
    "max_grad_norm": 0.1,
    "weight_decay": 0.1,
    "auto_resume_from_checkpoints": True,
}
# examples of one optimizer step, over all ranks
_GLOBAL_BATCH = 8


def write_case(folder: Path, name: str, engine: str, ranks: int = RANKS, **changes: Any) -> Path:
    """Write ``<name>.yml`` for ``single``, an engine of `ENGINES`, or ``zero<stage>-offload``; returns its path."""
    keys = _TRAINING | {"gradient_accumulation_steps": _GLOBAL_BATCH // (_TRAINING["micro_batch_size"] * ranks)}
    if engine.startswith("zero"):
        keys["deepspeed"] = str(write_deepspeed_json(folder, engine, bool(changes.get("bf16"))))
    return write_config(folder, name, **(keys | changes))


def write_deepspeed_json(folder: Path, engine: str, bf16: bool) -> Path:
    """The shipped configuration of a ZeRO stage, in bf16 or float32, without what CPU ranks cannot do."""
    settings = json.loads((_SHIPPED / f"{engine.replace('-', '_')}.json").read_text())
    zero = settings["zero_optimization"]
    zero["overlap_comm"] = False
    for offload in ("offload_optimizer", "offload_param"):
        if offload in zero:
            zero[offload]["pin_memory"] = False
    if zero["stage"] == 3:
        # else every parameter of a small model would stay gathered
        zero["stage3_param_persistence_threshold"] = 0
    settings["bf16"]["enabled"] = bf16
    path = folder / f"{engine}_{'bf16' if bf16 else 'float32'}.json"
    path.write_text(json.dumps(settings, indent=1))
    return path
