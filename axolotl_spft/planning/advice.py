"""What fits, and what to change in the configuration when a run does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from axolotl_spft.planning.estimate import Estimate, estimate
from axolotl_spft.planning.settings import Settings
from axolotl_spft.planning.shapes import ModelShape

ENGINES = {"single": "one process", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
BITS = (16, 8, 4)
# of the configurations in `integration/deepspeed`
_BUCKETS, _PREFETCHED, _REUSED = 2 * 25_000_000, 25_000_000, 1_000_000_000


class Change(NamedTuple):
    """One step on the way to a run that fits, on top of those before it."""

    text: str
    estimate: Estimate


def alternatives(shape: ModelShape, run: Settings, gpu_bytes: int) -> dict[str, dict[int, Estimate | None]]:
    """The run under every engine and with every precision of its base; None where that cannot be."""
    table: dict[str, dict[int, Estimate | None]] = {}
    for engine in ENGINES:
        if engine != "single" and run.gpus == 1:
            continue
        changed = _under(run, engine)
        table[engine] = {
            bits: None
            if (engine, bits) == ("zero3", 8) or (run.bits_are_fixed and bits != run.bits)
            else estimate(shape, changed._replace(bits=bits), gpu_bytes)
            for bits in BITS
        }
    return table


def changes_that_help(shape: ModelShape, run: Settings, gpu_bytes: int) -> list[Change]:
    """Changes, one after the other, until the run fits; those that do not lower what it needs are left out."""
    changes: list[Change] = []
    needed = estimate(shape, run, gpu_bytes).needed
    for text, change in _changes(run):
        if needed <= gpu_bytes:
            break
        changed = change(run)
        found = estimate(shape, changed, gpu_bytes)
        if found.needed < needed:
            run, needed = changed, found.needed
            changes.append(Change(text, found))
    return changes


def _changes(run: Settings) -> Iterator[tuple[str, Callable[[Settings], Settings]]]:
    """The cheap ones first."""
    if not run.checkpointing:
        yield "gradient_checkpointing: true", lambda each: each._replace(checkpointing=True)
    if not run.fused_loss:
        yield "chunked_cross_entropy: true", lambda each: each._replace(fused_loss=True)
    if run.rows > 1 and run.rows % 2 == 0:
        yield (
            "half the `micro_batch_size`, twice the `gradient_accumulation_steps`",
            lambda each: each._replace(rows=each.rows // 2, accumulates=True),
        )
    if run.state_bits == 32:
        yield "optimizer: sparse_adamw_8bit", lambda each: each._replace(state_bits=8)
    if run.gpus > 1 and run.engine != "zero3" and run.bits != 8:
        yield "deepspeed: integration/deepspeed/zero3.json", lambda each: _under(each, "zero3")
    if run.bits > 8 and not run.bits_are_fixed and run.engine != "zero3" and run.gpus == 1:
        yield "load_in_8bit: true", lambda each: each._replace(bits=8)
    if run.bits > 4 and not run.bits_are_fixed:
        yield "load_in_4bit: true", lambda each: each._replace(bits=4)
    yield "half the `sequence_len`", lambda each: each._replace(sequence_len=each.sequence_len // 2)


def _under(run: Settings, engine: str) -> Settings:
    if engine == run.engine:
        return run
    changes: dict[str, Any] = {"buckets": (run.buckets or _BUCKETS) if engine.startswith("zero") else 0}
    if not engine.startswith("zero"):
        changes |= {"offload_optimizer": False, "offload_base": False}
    changes |= {"prefetched": _PREFETCHED, "reused": _REUSED} if engine == "zero3" else {"prefetched": 0, "reused": 0}
    return run._replace(engine=engine, gpus=1 if engine == "single" else run.gpus, **changes)
