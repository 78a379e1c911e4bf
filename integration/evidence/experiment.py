"""An experiment is a small JSON file; this makes the list of its runs.

    {"question": "a", "order": 1, "title": "...",
     "base": "smollm2-135m-instruct", "bits": 16, "task": "gsm8k",
     "steps": 60, "batch": 4, "length": 96, "seeds": [0], "repeats": [1, 2],
     "methods": [{"label": "LoRA r4", "method": "lora", "options": {"r": 4}, "learning_rates": [0.001, 0.003]}]}

``order`` is the experiment's place in the queue, which it is no part of otherwise; ``reference`` the method that
others are compared with, by default the first. Everything but ``question`` to ``title`` may stand in an entry of
``methods`` too, for that entry alone.
``learning_rates`` are where the search for the best rate begins: the grid grows along 1, 3, 10, 30, ... by one rate
at a time while the best recorded one is its first or last. ``repeats`` are seeds that run at the best rate alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from integration.evidence.methods import METHODS
from integration.evidence.tasks import TASKS

DEFAULTS = {
    "bits": 16,
    "steps": 60,
    "batch": 4,
    "length": 96,
    "judged": 64,
    "texts": 32,
    "warmup": 0.1,
    "samples": 64,
    "dtype": "bfloat16",
}
_OF_A_RUN = ("base", "task", *DEFAULTS)
_SEARCH = ("learning_rates", "seeds", "repeats")
_OF_A_METHOD = {"label", "method", "options", *_SEARCH, *_OF_A_RUN}
_OF_AN_EXPERIMENT = {"question", "order", "title", "reference", "methods", *_SEARCH, *_OF_A_RUN}
_RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-6, 0) for digit in (1, 3))

Records = Mapping[str, Mapping[str, Any]]


def read_experiment(path: Path) -> dict[str, Any]:
    """The file's contents, checked.

    Raises:
        SystemExit: with every problem, a line each.
    """
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    problems = [f"unknown key `{key}`" for key in sorted(set(experiment) - _OF_AN_EXPERIMENT)]
    problems += [f"`{key}` is missing" for key in ("question", "title", "methods") if key not in experiment]
    for number, entry in enumerate(experiment.get("methods", [])):
        where = f"methods[{number}]"
        problems += [f"{where}: unknown key `{key}`" for key in sorted(set(entry) - _OF_A_METHOD)]
        if entry.get("method") not in METHODS:
            problems.append(f"{where}: `method: {entry.get('method')}` must be one of {', '.join(METHODS)}")
        merged = {**experiment, **entry}
        if merged.get("task") not in TASKS:
            problems.append(f"{where}: `task: {merged.get('task')}` must be one of {', '.join(TASKS)}")
        if not merged.get("base"):
            problems.append(f"{where}: `base` is missing")
        if entry.get("method") != "none" and not merged.get("learning_rates"):
            problems.append(f"{where}: `learning_rates` is missing")
        outside = sorted(set(merged.get("learning_rates") or []) - set(_RATES))
        problems += [f"{where}: `learning_rates` has {rate}, which is not 1 or 3 times a power of 10 from 1e-6 to 3e-1"
                     for rate in outside]  # fmt: skip
        if not entry.get("label"):
            problems.append(f"{where}: `label` is missing")
    reference = experiment.get("reference")
    if reference is not None and reference not in {entry.get("label") for entry in experiment.get("methods", [])}:
        problems.append(f"`reference: {reference}` is the label of no method")
    if problems:
        raise SystemExit("\n".join(f"{path}: {problem}" for problem in problems))
    return experiment


def runs_of(experiment: Mapping[str, Any], records: Records | None = None) -> list[dict[str, Any]]:
    """One flat dict a run: what it is, and nothing of what comes of it.

    With records (key -> line) the list holds also the runs that follow from them: rates beyond the edge of a grid, and
    the repeats at the best rate of a finished one.
    """
    records = records or {}
    searches = [_Search(experiment, entry, records) for entry in experiment["methods"]]
    # what was asked for first, with seeds outermost: every row has its first figure early
    first = [run for seed in _seeds(searches) for search in searches for run in search.runs(seed)]
    return [*first, *(run for search in searches for run in search.repeats())]


def queue(folder: Path) -> list[Path]:
    """The experiments that have an ``order``, in that order."""
    files = [(read_experiment(path).get("order"), path) for path in sorted(folder.glob("*.json"))]
    return [path for order, path in sorted(pair for pair in files if pair[0] is not None)]


def expected_runs(experiment: Mapping[str, Any], records: Records) -> list[dict[str, Any]]:
    """The runs that an experiment will have had at its end; a grid is taken to need one more rate than asked for."""
    expected = []
    for entry in experiment["methods"]:
        search = _Search(experiment, entry, records)
        grid, repeats = [run for seed in search.seeds for run in search.runs(seed)], [*search.repeats()]
        begun = any(key_of(run) in records for run in grid)
        more = 0 if begun or entry["method"] == "none" else len(search.seeds)
        more += len(search.wanted_repeats) - len(repeats)
        unknown = [grid[-1] | {"learning_rate": math.nan, "seed": number} for number in range(more)]
        expected += [*grid, *repeats, *unknown]
    return expected


class _Search:
    """The runs of one entry of an experiment: its grid, as far as the records have it grow."""

    def __init__(self, experiment: Mapping[str, Any], entry: Mapping[str, Any], records: Records):
        self._settings = {**DEFAULTS, "seeds": [0], "repeats": [], **experiment, **entry}
        self._records = records
        trains = entry["method"] != "none"
        self.seeds = self._settings["seeds"] if trains else [0]
        self.wanted_repeats = self._settings["repeats"] if trains else []
        self._rates = sorted(self._settings["learning_rates"]) if trains else [0.0]
        if trains:
            while (beyond := self._beyond_the_edge()) is not None:
                self._rates = sorted([*self._rates, beyond])

    def runs(self, seed: int) -> Iterator[dict[str, Any]]:
        if seed in self.seeds:
            yield from (self._run(rate, seed) for rate in self._rates)

    def repeats(self) -> Iterator[dict[str, Any]]:
        """At the best rate of a finished grid that is no edge."""
        if self.wanted_repeats and (best := self._best()) is not None:
            yield from (self._run(best, seed) for seed in self.wanted_repeats)

    def _run(self, rate: float, seed: int) -> dict[str, Any]:
        run = {key: self._settings[key] for key in _OF_A_RUN}
        run |= {"method": self._settings["method"], "options": self._settings.get("options", {})}
        return run | {"learning_rate": rate, "seed": seed}

    def _loss(self, rate: float) -> float | None:
        found = [self._records.get(key_of(self._run(rate, seed))) for seed in self.seeds]
        if None in found:
            return None
        return statistics.fmean(each["result"]["after_task_loss"] for each in found)

    def _best(self) -> float | None:
        losses = {rate: self._loss(rate) for rate in self._rates}
        return None if None in losses.values() else min(losses, key=losses.get)

    def _beyond_the_edge(self) -> float | None:
        """The next rate outside the grid where its best one is its first or last."""
        best = self._best()
        at = _RATES.index(best) if best is not None else None
        if at is None or best not in (self._rates[0], self._rates[-1]):
            return None
        sides = [at - 1] * (best == self._rates[0]) + [at + 1] * (best == self._rates[-1])
        # a grid of one rate grows on both sides, upwards first
        return next((_RATES[side] for side in reversed(sides) if 0 <= side < len(_RATES)), None)


def _seeds(searches: list[_Search]) -> list[int]:
    return sorted({seed for search in searches for seed in search.seeds})


def key_of(run: Mapping[str, Any]) -> str:
    """What tells a run from all others: equal for equal dicts, whatever their order."""
    return json.dumps({name: run[name] for name in sorted(run) if name not in ("result", "made")}, sort_keys=True)
