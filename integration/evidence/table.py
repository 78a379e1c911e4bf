"""Recorded runs summed up: one row for each method and learning rate, its figures over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from integration.evidence.experiment import DEFAULTS, key_of, runs_of


@dataclass(frozen=True)
class Row:
    """Figures of one method at one rate: name -> seed -> figure."""

    label: str
    method: str
    learning_rate: float
    trained: int
    figures: Mapping[str, Mapping[int, float]]
    # seeds that were asked for
    wanted: Set[int]
    # those of them that rates are chosen by
    searched: Set[int] = frozenset({0})

    def mean(self, name: str, seeds: Set[int] | None = None) -> float | None:
        """Over all seeds, or those of ``seeds`` that are recorded."""
        found = self.figures.get(name, {})
        values = [value for seed, value in found.items() if seeds is None or seed in seeds]
        return statistics.fmean(values) if values else None

    @property
    def losses(self) -> Mapping[int, float]:
        """Seed -> loss on the task after training."""
        return self.figures.get("after_task_loss", {})

    @property
    def seeds(self) -> Set[int]:
        """Those that have been trained."""
        return self.losses.keys()

    def text(self, name: str) -> str:
        """The mean, and with several seeds half of the range."""
        values = self.figures.get(name, {}).values()
        if not values:
            return ""
        mean = f"{statistics.fmean(values):.3f}"
        return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


# label -> its row at the best rate, and whether that is no edge of its grid
Best = dict[str, tuple[Row, bool]]


class Difference(NamedTuple):
    """Of one row to another, a mean over the ``seeds`` that both have; ``error``: its standard error."""

    mean: float
    error: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class Price(NamedTuple):
    """What a method pays on other text for a gain; ``below_grid``: read off below the lowest rate tried."""

    rise: float
    below_grid: bool


def rows_of(experiment: dict[str, Any], records: Mapping[str, dict[str, Any]]) -> list[Row]:
    """The rows that have a recorded run, in the order of the experiment."""
    rows = []
    for entry in experiment["methods"]:
        runs = runs_of({**experiment, "methods": [entry]}, records)
        searched = frozenset({**DEFAULTS, **experiment, **entry}.get("seeds", [0]))
        for rate in sorted({run["learning_rate"] for run in runs}):
            of_rate = [run for run in runs if run["learning_rate"] == rate]
            results = {run["seed"]: records[key_of(run)]["result"] for run in of_rate if key_of(run) in records}
            if results:
                names = sorted(set().union(*results.values()))
                figures = {name: {seed: each[name] for seed, each in results.items() if name in each} for name in names}
                wanted = frozenset(run["seed"] for run in of_rate)
                trained = int(next(iter(results.values()))["trained"])
                rows.append(Row(entry["label"], entry["method"], rate, trained, figures, wanted, searched))
    return rows


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``one`` less ``other``, both seed -> figure, by the seeds that both have; None where they share none."""
    found = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Difference(statistics.fmean(found), error, len(found))


def shared_seeds(rows: Iterable[Row]) -> Set[int]:
    """The seeds that all of the rows have been trained with."""
    return frozenset.intersection(*(frozenset(row.seeds) for row in rows))


def prices_of_gain(rows: Sequence[Row], text: str, share: float) -> tuple[float, dict[str, Price | None]]:
    """The rise of the loss on untouched ``text`` over the base's that each method pays for one and the same gain.

    A method is a curve over its rates, from its own start at rate 0: between two rates it is read off the straight
    line. Of the seeds those count that all rows have; runs that diverged are no part of a curve.

    Returns:
        The task loss that is asked for, which is ``share`` of the largest gain of all rows below the highest start, and
        label -> price at the lowest rate that reaches it, or None where none does.
    """
    trained = [row for row in rows if row.seeds]
    shared = shared_seeds(trained)

    def mean(row: Row, name: str) -> float:
        return row.mean(name, shared)

    start = max(mean(row, "before_task_loss") for row in trained)
    target = start - share * (start - min(mean(row, "after_task_loss") for row in trained))
    base = next((row.mean(f"before_{text}_loss") for row in rows if row.method == "none"), None)
    prices = {}
    for label in dict.fromkeys(row.label for row in trained):
        grid = sorted((row for row in trained if row.label == label), key=lambda row: row.learning_rate)
        before = mean(grid[0], "before_task_loss"), mean(grid[0], f"before_{text}_loss")
        tried = ((mean(row, "after_task_loss"), mean(row, f"after_{text}_loss")) for row in grid)
        points = [before, *(point for point in tried if all(map(math.isfinite, point)))]
        prices[label] = None
        for number, ((loss, other), (next_loss, next_other)) in enumerate(itertools.pairwise(points)):
            if next_loss <= target:
                part = (loss - target) / (loss - next_loss)
                rise = other + part * (next_other - other) - (before[1] if base is None else base)
                prices[label] = Price(rise, below_grid=number == 0)
                break
    return target, prices


def best_rows(rows: Iterable[Row]) -> Best:
    """label -> its row of the lowest task loss, by the seeds that all its rates have, and whether it is no edge."""
    grids: dict[str, list[Row]] = {}
    for row in rows:
        if row.seeds:
            grids.setdefault(row.label, []).append(row)
    best = {}
    for label, grid in grids.items():
        ordered = sorted(grid, key=lambda row: row.learning_rate)
        shared = shared_seeds(grid)
        winner = min(ordered, key=lambda row: row.mean("after_task_loss", shared))
        best[label] = winner, ordered[0] is not winner is not ordered[-1]
    return best


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])
