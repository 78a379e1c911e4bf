"""The recorded runs: one JSON line each, appended when a run has ended."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_spft.bench.machine import machine
from integration.evidence.experiment import key_of

EXPERIMENTS, RESULTS = Path(__file__).with_name("experiments"), Path(__file__).with_name("results")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The recorded lines of a file, if there is one; a line that a crash cut off is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def records_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What all files of a folder hold, as key of the run -> record: experiments share the runs they have in common."""
    return {key_of(record): record for path in sorted(folder.glob("*.jsonl")) for record in lines_of(path)}


def rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    """To six digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in result.items()}


def _commit() -> str | None:
    """That of the working tree, with a + where Python files of it were changed; None where git knows none."""
    try:
        return _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "--", ":/*.py"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*asked: str) -> str:
    command = ["git", "-C", str(EXPERIMENTS.parent), *asked]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def append(path: Path, record: Mapping[str, Any], **made: Any) -> None:
    """Add one line, with the machine, versions, date and commit, and what else is known of how it was ``made``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**record, "made": machine() | {"commit": _commit()} | made}, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
