"""What a queue of experiments still costs, from what recorded runs took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_spft.tables import aligned
from integration.evidence.experiment import Records, expected_runs, key_of, read_experiment

# from what makes two runs alike in cost to what they have in common at least
_ALIKE = (("base", "task", "bits", "method"), ("base", "task", "bits"), ("base", "task"), ("base",), ("task",), ())


def plan(files: Sequence[Path], records: Records) -> str:
    """A table: runs done and left of each experiment, and the CPU time of those left.

    A run that two experiments have in common counts in the first of them.
    """
    rows, seen, total = [], set(), 0.0
    for path in files:
        runs = {key_of(run): run for run in expected_runs(read_experiment(path), records)}
        left = [run for key, run in runs.items() if key not in records and key not in seen]
        seen |= runs.keys()
        seconds = sum(_seconds(run, records) for run in left)
        total += seconds
        rows.append([path.stem, str(len(runs) - len(left)), str(len(left)), f"{seconds / 3600:.1f} h"])
    rows.append(["all", "", "", f"{total / 3600:.1f} h"])
    return "\n".join(aligned(["experiment", "done or shared", "left", "of one core"], rows))


def _seconds(run: Mapping[str, Any], records: Records) -> float:
    for names in _ALIKE:
        alike = [
            each["result"]["cpu_seconds"]
            for each in records.values()
            if (each["method"] == "none") == (run["method"] == "none") and all(each[n] == run[n] for n in names)
        ]
        if alike:
            return statistics.median(alike)
    return 0.0
