"""The figures as Markdown tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from axolotl_spft.bench.options import Options
from axolotl_spft.files import atomic_path

Row = dict[str, Any]
SCHEMA_VERSION = 1
_MIB = 2**20


def results(options: Options, machine: dict[str, Any], rows: list[Row], left_out: dict[str, str]) -> dict[str, Any]:
    """What the JSON file of a comparison holds."""
    return _head(options, machine) | {"rows": rows, "left_out": left_out}


def sweep_results(
    options: Options, machine: dict[str, Any], over: str, points: Sequence[tuple[float, list[Row], dict[str, str]]]
) -> dict[str, Any]:
    """What the JSON file of a sweep holds."""
    listed = [{"value": value, "rows": rows, "left_out": left_out} for value, rows, left_out in points]
    return _head(options, machine) | {"sweep": over, "points": listed}


def _head(options: Options, machine: dict[str, Any]) -> dict[str, Any]:
    chosen = asdict(options)
    # a name says what was used; where it lay on this machine does not
    chosen["model"], chosen["mask_statistics"] = Path(options.model).name, Path(options.mask_statistics).name
    return {"schema_version": SCHEMA_VERSION, "machine": machine, "options": chosen}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def comparison(rows: Sequence[Row]) -> str:
    """Three tables: the step, the bytes per trained value, and what happens before and after training."""
    trained = [row for row in rows if row["trained"]]
    return "\n\n".join(filter(None, [_step_table(rows), _memory_table(trained), _around_table(trained)]))


def _step_table(rows: Sequence[Row]) -> str:
    return _table(
        ("method", "step", "spread", "of limit", "of LoRA", "tokens/s", "peak MiB", "kept MiB", "by adapted layers",
         "trained", "area"),
        [
            (
                row["method"],
                _milliseconds(row["median_seconds"]),
                f"{100 * row['spread']:.1f}%",
                _ratio(rows, row, "limit"),
                _ratio(rows, row, "lora"),
                f"{row['tokens_per_second']:,.0f}",
                _mib(row["peak_bytes"]),
                _mib(row["kept_bytes"]),
                _mib(row["kept_by_adapted_bytes"]),
                f"{row['trained']:,}",
                "" if row["area"] is None else f"{100 * row['area']:.1f}%",
            )
            for row in rows
        ],
    )  # fmt: skip


def _memory_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    parts = list(rows[0]["bytes_per_value"])
    return _table(
        ("bytes per trained value", *(part.replace("_", " ") for part in parts), "total", "file"),
        [
            (
                row["method"],
                *(f"{row['bytes_per_value'][part]:.1f}" for part in parts),
                f"{sum(row['bytes_per_value'].values()):.1f}",
                "" if row["file_bytes_per_value"] is None else f"{row['file_bytes_per_value']:.1f}",
            )
            for row in rows
        ],
    )


def _around_table(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["mask"] or row["serving_seconds"]]
    if not shown:
        return ""
    return _table(
        ("before and after", "salience pass", "of gradient's", "selection", "peak MiB", "one token",
         "switch + one token", "merge", "unmerge"),
        [
            (
                row["method"],
                _milliseconds((row["mask"] or {}).get("pass_seconds")),
                _pass_ratio(rows, row),
                _milliseconds((row["mask"] or {}).get("selection_seconds")),
                _mib((row["mask"] or {}).get("peak_bytes")),
                *(
                    _milliseconds((row["serving_seconds"] or {}).get(key))
                    for key in ("forward", "switch", "merge", "unmerge")
                ),
            )
            for row in shown
        ],
    )  # fmt: skip


def sweep_table(over: str, points: Sequence[tuple[float, list[Row], dict[str, str]]]) -> str:
    """One line per value and method."""
    return _table(
        (
            over,
            "method",
            "step",
            "spread",
            "of limit",
            "of LoRA",
            "tokens/s",
            "peak MiB",
            "kept MiB",
            "trained",
            "area",
        ),
        [
            (
                f"{value:g}",
                row["method"],
                _milliseconds(row["median_seconds"]),
                f"{100 * row['spread']:.1f}%",
                _ratio(rows, row, "limit"),
                _ratio(rows, row, "lora"),
                f"{row['tokens_per_second']:,.0f}",
                _mib(row["peak_bytes"]),
                _mib(row["kept_bytes"]),
                f"{row['trained']:,}",
                "" if row["area"] is None else f"{100 * row['area']:.1f}%",
            )
            for value, rows, _ in points
            for row in rows
        ],
    )  # fmt: skip


def _ratio(rows: Sequence[Row], row: Row, to: str) -> str:
    reference = next((other for other in rows if other["method"] == to), None)
    return "" if reference is None else f"{row['median_seconds'] / reference['median_seconds']:.2f}"


def _pass_ratio(rows: Sequence[Row], row: Row) -> str:
    of_gradient = next((other["mask"] for other in rows if other["method"] == "spft-gradient"), None)
    if not of_gradient or not of_gradient["pass_seconds"] or not row["mask"]:
        return ""
    return f"{row['mask']['pass_seconds'] / of_gradient['pass_seconds']:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f} ms"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / _MIB:,.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with columns that also line up in a terminal."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(line, widths))) + " |"
        for line in lines
    )  # fmt: skip
