"""Recorded runs summed up: one row for each method and learning rate, its figures over the seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from integration.evidence.experiment import key_of, runs_of


@dataclass(frozen=True)
class Row:
    """Figures of one method at one rate: name -> one figure for each recorded seed."""

    label: str
    method: str
    learning_rate: float
    trained: int
    figures: Mapping[str, tuple[float, ...]]
    # of how many seeds that were asked for
    wanted: int

    def mean(self, name: str) -> float | None:
        values = self.figures.get(name)
        return statistics.fmean(values) if values else None

    def text(self, name: str) -> str:
        """The mean, and with several seeds half of the range."""
        values = self.figures.get(name)
        if not values:
            return ""
        if len(values) == 1:
            return f"{values[0]:.3f}"
        return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def rows_of(experiment: dict[str, Any], records: Mapping[str, dict[str, Any]]) -> list[Row]:
    """The rows that have a recorded run, in the order of the experiment."""
    grids: dict[tuple, list] = {}
    for entry in experiment["methods"]:
        for run in runs_of({**experiment, "methods": [entry]}, records):
            grids.setdefault((entry["label"], run["method"]), []).append(run)
    rows = []
    for (label, method), runs in grids.items():
        for rate in sorted({run["learning_rate"] for run in runs}):
            of_rate = [run for run in runs if run["learning_rate"] == rate]
            results = [records[key_of(run)]["result"] for run in of_rate if key_of(run) in records]
            if results:
                names = sorted(set().union(*results))
                figures = {name: tuple(each[name] for each in results if name in each) for name in names}
                rows.append(Row(label, method, rate, int(results[0]["trained"]), figures, len(of_rate)))
    return rows


def rises_at_gain(rows: Sequence[Row], text: str, share: float) -> tuple[float, dict[str, float | None]]:
    """The rise of the loss on untouched ``text`` that each method pays for one and the same gain on the task.

    A method is a curve over its rates, from the base at rate 0: between two rates it is read off the straight line.

    Returns:
        The task loss that is asked for, which is ``share`` of the largest gain of all rows below the base's, and
        label -> rise at the lowest rate that reaches it, or None where none does.
    """
    trained = [row for row in rows if row.mean("after_task_loss") is not None]
    start = max(row.mean("before_task_loss") for row in trained)
    target = start - share * (start - min(row.mean("after_task_loss") for row in trained))
    rises = {}
    for label in dict.fromkeys(row.label for row in trained):
        grid = sorted((row for row in trained if row.label == label), key=lambda row: row.learning_rate)
        before = grid[0].mean("before_task_loss"), grid[0].mean(f"before_{text}_loss")
        points = [before, *((row.mean("after_task_loss"), row.mean(f"after_{text}_loss")) for row in grid)]
        rises[label] = None
        for (loss, other), (next_loss, next_other) in itertools.pairwise(points):
            if next_loss <= target:
                part = (loss - target) / (loss - next_loss)
                rises[label] = other + part * (next_other - other) - before[1]
                break
    return target, rises


def best_rows(rows: Iterable[Row]) -> dict[str, tuple[Row, bool]]:
    """label -> its row of the lowest mean task loss, and whether that rate lies inside the grid."""
    grids: dict[str, list[Row]] = {}
    for row in rows:
        if row.mean("after_task_loss") is not None:
            grids.setdefault(row.label, []).append(row)
    best = {}
    for label, grid in grids.items():
        ordered = sorted(grid, key=lambda row: row.learning_rate)
        winner = min(ordered, key=lambda row: row.mean("after_task_loss"))
        best[label] = winner, ordered[0] is not winner is not ordered[-1]
    return best
