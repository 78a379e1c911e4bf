"""The recorded runs: one JSON line each, appended when a run has ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from axolotl_spft.bench.machine import machine
from integration.evidence.experiment import key_of

EXPERIMENTS, RESULTS = Path(__file__).with_name("experiments"), Path(__file__).with_name("results")


def records_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What all files of a folder hold, as key of the run -> record: experiments share the runs they have in common.

    A line that a crash cut off is passed over.
    """
    records = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[key_of(record)] = record
    return records


def append(path: Path, run: dict[str, Any], result: dict[str, float]) -> None:
    """Add one run and what came of it, with the machine, versions and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in result.items()}
    line = json.dumps({**run, "result": rounded, "made": machine()}, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
