"""A plan as text and as JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from axolotl_spft.planning.advice import BITS, ENGINES, Change
from axolotl_spft.planning.estimate import GIB, RESERVE_BYTES, Estimate
from axolotl_spft.planning.settings import Settings
from axolotl_spft.planning.shapes import ModelShape

_PARTS = {
    "base": "base weights",
    "trained": "trained values",
    "indices": "masks and originals",
    "gradients": "gradients",
    "optimizer": "moments and masters",
    "activations": "activations",
    "peak": "peak in training",
    "salience": "accumulators of the salience pass",
    "salience_peak": "peak of the salience pass",
}
# of the settings, what JSON has elsewhere, or not at all
_APART = ("base_model", "options", "remarks")


class Plan(NamedTuple):
    """What is told of a run.

    Attributes:
        source: where the shape of the base model was found.
        table: engine -> bits of the base -> what the run would need so, None where it cannot be.
        changes: that would make it fit, one on top of the other.
        gpu_bytes: of one GPU.
    """

    source: str
    shape: ModelShape
    run: Settings
    found: Estimate
    table: dict[str, dict[int, Estimate | None]]
    changes: list[Change]
    gpu_bytes: int


def as_text(plan: Plan) -> str:
    """A few tables."""
    source, shape, run, found, table, changes, gpu_bytes = plan
    head = [
        f"{run.base_model} ({source})",
        f"{found.values:,} values, {100 * found.values / found.entries:.3g}% of {found.entries:,} entries in "
        f"{len(shape.targets)} matrices; the adapter's file {_size(found.file)}",
        f"{ENGINES[run.engine]}, {run.gpus} GPU{'s' if run.gpus > 1 else ''} of {gpu_bytes / GIB:g} GiB, base in "
        f"{run.bits if run.bits < 16 else 8 * run.dtype_bytes} bits, {run.rows} x {run.sequence_len:,} tokens, "
        f"gradient checkpointing {'on' if run.checkpointing else 'off'}",
        "",
        "Memory per GPU:",
    ]
    lines = [f"  {text:34} {_size(getattr(found, name)):>12}" for name, text in _PARTS.items()]
    if found.salience_host:
        lines.append(f"  {'accumulators on the host, per rank':34} {_size(found.salience_host):>12}")
    for name, where in (("collected", "GPU"), ("collected_host", "host")):
        if getattr(found, name):
            lines.append(f"  {f'kept for a re-selection on the {where}':34} {_size(getattr(found, name)):>12}")
    lines += ["", f"It needs {_size(found.needed)} with {_size(RESERVE_BYTES)} of reserve: {_fits(found, gpu_bytes)}."]
    if changes:
        lines += ["Change, one on top of the other:"]
        lines += [f"  {each.text:70} {_size(each.estimate.needed):>10}" for each in changes]
        if changes[-1].estimate.needed > gpu_bytes:
            lines.append("  which is not enough: take more GPUs, larger ones, or a smaller base model")
    lines += ["", f"Needed per GPU otherwise (* does not fit in {gpu_bytes / GIB:g} GiB):"]
    lines.append("  " + "base".ljust(14) + "".join(f"{bits} bits".rjust(14) for bits in BITS))
    for engine, row in table.items():
        cells = ["-" if each is None else _size(each.needed) + ("*" if each.needed > gpu_bytes else " ")
                 for each in row.values()]  # fmt: skip
        lines.append("  " + ENGINES[engine].ljust(14) + "".join(cell.rjust(14) for cell in cells))
    if shape.experts:
        lines.append("Activations of a mixture of experts are estimated as if the tokens were spread evenly.")
    return "\n".join([*head, *lines, *run.remarks, *shape.remarks])


def as_json(plan: Plan) -> dict[str, Any]:
    """The same, in bytes."""
    source, shape, run, found, table, changes, gpu_bytes = plan

    def row(each: Estimate) -> dict[str, Any]:
        return {**each._asdict(), "needed": each.needed, "fits": each.needed <= gpu_bytes}

    return {
        "base_model": run.base_model,
        "source": source,
        "matrices": len(shape.targets),
        "gpu_bytes": gpu_bytes,
        "run": {name: value for name, value in run._asdict().items() if name not in _APART},
        "estimate": row(found),
        "remarks": [*run.remarks, *shape.remarks],
        "changes": [{"change": each.text, **row(each.estimate)} for each in changes],
        "alternatives": {
            engine: {str(bits): each and row(each) for bits, each in by_bits.items()}
            for engine, by_bits in table.items()
        },
    }


def _fits(found: Estimate, gpu_bytes: int) -> str:
    return "fits" if found.needed <= gpu_bytes else f"does not fit in {gpu_bytes / GIB:g} GiB"


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:,.1f} MiB"
