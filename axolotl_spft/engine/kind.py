"""Which engine a run trains under."""

from __future__ import annotations

from typing import Any


def engine_of(accelerator: Any) -> str:
    """``single``, ``ddp``, or ``zero0`` to ``zero3`` by DeepSpeed's stage, of an `accelerate.Accelerator`."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    return "ddp" if accelerator.num_processes > 1 else "single"
