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
    """Figures of one method at one rate: name -> one figure for each recorded seed, those of the grid first."""

    label: str
    method: str
    learning_rate: float
    trained: int
    figures: Mapping[str, tuple[float, ...]]
    # of how many seeds that were asked for
    wanted: int

    def mean(self, name: str, seeds: int | None = None) -> float | None:
        """Over all seeds, or the first few."""
        values = self.figures.get(name, ())[:seeds]
        return statistics.fmean(values) if values else None

    @property
    def seeds(self) -> int:
        """How many have been trained."""
        return len(self.figures.get("after_task_loss", ()))

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

    A method is a curve over its rates, from the base at rate 0: between two rates it is read off the straight line. Of
    the seeds those count that all rates have.

    Returns:
        The task loss that is asked for, which is ``share`` of the largest gain of all rows below the base's, and
        label -> rise at the lowest rate that reaches it, or None where none does.
    """
    trained = [row for row in rows if row.seeds]
    shared = min(row.seeds for row in trained)

    def mean(row: Row, name: str) -> float:
        return row.mean(name, shared)

    start = max(mean(row, "before_task_loss") for row in trained)
    target = start - share * (start - min(mean(row, "after_task_loss") for row in trained))
    rises = {}
    for label in dict.fromkeys(row.label for row in trained):
        grid = sorted((row for row in trained if row.label == label), key=lambda row: row.learning_rate)
        before = mean(grid[0], "before_task_loss"), mean(grid[0], f"before_{text}_loss")
        points = [before, *((mean(row, "after_task_loss"), mean(row, f"after_{text}_loss")) for row in grid)]
        rises[label] = None
        for (loss, other), (next_loss, next_other) in itertools.pairwise(points):
            if next_loss <= target:
                part = (loss - target) / (loss - next_loss)
                rises[label] = other + part * (next_other - other) - before[1]
                break
    return target, rises


def best_rows(rows: Iterable[Row]) -> dict[str, tuple[Row, bool]]:
    """label -> its row of the lowest task loss, by the seeds that all its rates have, and whether it is no edge."""
    grids: dict[str, list[Row]] = {}
    for row in rows:
        if row.seeds:
            grids.setdefault(row.label, []).append(row)
    best = {}
    for label, grid in grids.items():
        ordered = sorted(grid, key=lambda row: row.learning_rate)
        shared = min(row.seeds for row in grid)
        winner = min(ordered, key=lambda row: row.mean("after_task_loss", shared))
        best[label] = winner, ordered[0] is not winner is not ordered[-1]
    return best
