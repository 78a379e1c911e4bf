"""Draws the page of all experiments, and a picture each, from the recorded lines."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_spft.files import atomic_path
from axolotl_spft.tuner.step_unit import unit
from integration.evidence.experiment import DEFAULTS, Records, queue, read_experiment
from integration.evidence.picture import draw
from integration.evidence.plan import plan
from integration.evidence.records import records_of
from integration.evidence.table import Row, best_rows, rises_at_gain, rows_of

_QUESTIONS = {
    "a": "The learning rate against density and rank",
    "b": "Methods and metrics at equal counts",
    "c": "Where the budget goes",
    "d": "Quantized bases",
    "e": "Forgetting against gain",
    "f": "Sparse and low rank together",
    "g": "How many samples the mask needs",
    "h": "Static against dynamic masks",
}
_UNTOUCHED = ("english", "python")
_GAIN = 0.95
_HEAD = """# Evidence on real models

Made by `python -m integration.evidence report` from the lines in `results/`; each experiment is a file of
`experiments/`. `python -m integration.evidence run --data FOLDER` carries out what is left, where FOLDER holds GSM8K
(openai/gsm8k) as JSON lines and ARC, OpenBookQA and BoolQ as JSON lists of `instruction`, `output`, `answer`; it may be
stopped and started again, and several may work side by side. `make evidence` repeats a small experiment in minutes.

Losses are means over the tokens of answers that were not trained on, after training; `±` is half of the range over the
seeds, and differences are between runs of the same seeds. Untouched text is of a kind that the task does not train: a
method that lowers the task's loss and raises this one forgets. The best rate of a method is bold; "edge" says that it
is the first or last of those tried, so that a better one may lie beyond. A run's learning rate rises over its first
tenth and then falls to 0; gradients are clipped to a norm of 1; LoRA's alpha is 2 r; rates are chosen by the same
held-out examples for all methods alike. The time of a step is the process', on one core.
"""


def write_report(experiments: Path, results: Path, output: Path) -> None:
    """Write ``README.md`` and ``<experiment>.png`` to ``output``; equal records give equal bytes of the page."""
    records = records_of(results)
    parts, measured = [_HEAD], []
    for path in [*queue(experiments), *sorted(set(experiments.glob("*.json")) - set(queue(experiments)))]:
        experiment = read_experiment(path)
        rows = rows_of(experiment, records)
        # runs that it shares with others are no answer to its question
        if (results / f"{path.stem}.jsonl").is_file() and any(row.seeds for row in rows):
            measured.append((path.stem, experiment, rows))
    for question, heading in _QUESTIONS.items():
        parts.append(f"## {question}. {heading}\n")
        if question == "e":
            # a price means something beside another's alone
            sections = [_forgetting(experiment, rows) for _, experiment, rows in measured if len(best_rows(rows)) > 1]
        else:
            sections = [_section(*each, _targets_of(each[1]["base"], records)) for each in measured
                        if each[1]["question"] == question]  # fmt: skip
        parts += sections or ["Not measured yet.\n"]
    for name, experiment, rows in measured:
        draw(output / f"{name}.png", experiment["title"], rows, next(iter(_untouched(rows)), None))
    left = plan(queue(experiments), records)
    parts.append(f"## What is left of the queue\n\n```text\n{left}\n```\n")
    parts.append(f"Recorded so far: {_machines(records)}.\n")
    with atomic_path(output / "README.md") as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _machines(records: Records) -> str:
    """How many runs which machine made with which torch."""
    made = Counter(
        f"{each['made']['gpu'] or each['made']['cpu']} with torch {each['made']['versions']['torch']}"
        for each in records.values()
    )
    return ", ".join(f"{count} runs on {machine}" for machine, count in sorted(made.items())) or "nothing"


class _Targets(NamedTuple):
    """The matrices of a base that are trained: the root mean square of their entries, and how many these are."""

    rms: float
    entries: float

    def unit(self, trained: int) -> float:
        """`axolotl_spft.step_unit` with so many trained values."""
        return unit(self.rms, trained / self.entries)


def _targets_of(base: str, records: Records) -> _Targets | None:
    of_base = [each for each in records.values() if each["base"] == base]
    rms = (each["result"].get("weight_rms") for each in of_base)
    # a sparse method trains this share of all
    entries = (
        each["result"]["trained"] / each["options"]["density"] for each in of_base if "density" in each["options"]
    )
    found = next(filter(None, rms), None), next(entries, None)
    return None if None in found else _Targets(*found)


def _section(name: str, experiment: dict[str, Any], rows: list[Row], targets: _Targets | None) -> str:
    untouched = _untouched(rows)
    judged = any("before_accuracy" in row.figures for row in rows)
    head = [
        "method",
        "trained",
        "rate",
        *["units"] * bool(targets),
        "seeds",
        "task loss",
        *[f"{text} loss" for text in untouched],
    ]
    head += ["accuracy"] * judged + ["step"]
    best = best_rows(rows)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        when = "before" if row.method == "none" else "after"
        chosen, inner = best.get(row.label, (None, True))
        rate = f"{row.learning_rate:g}" if row.learning_rate else ""
        if row is chosen:
            rate = f"**{rate}**" + ("" if inner else " (edge)")
        seeds = row.seeds or 1
        cells = [row.label, f"{row.trained:,}", rate]
        if targets:
            cells.append(f"{row.learning_rate / targets.unit(row.trained):.2g}" if row.method == "spft" else "")
        cells.append(f"{seeds} of {row.wanted}" if seeds < row.wanted else str(seeds))
        cells += [row.text(f"{when}_{name}_loss") for name in ("task", *untouched)]
        if judged:
            cells.append(row.text(f"{when}_accuracy"))
        step = row.mean("step_cpu_seconds")
        cells.append("" if step is None else f"{step:.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    setting = (
        f"`{experiment['base']}`, {experiment.get('bits', 16)} bits, {experiment['task']}, "
        f"{experiment.get('steps', DEFAULTS['steps'])} steps of {experiment.get('batch', DEFAULTS['batch'])}; "
        f"`experiments/{name}.json`"
    )
    if targets:
        setting += (
            f". The unit of a rate of sparse values is rms(W) (0.005 / density)^0.75, where rms(W) is {targets.rms:.3f}"
        )
    table = "\n".join(lines)
    picture = f"![{experiment['title']}]({name}.png)"
    return f"### {experiment['title']}\n\n{setting}.\n\n{_ranking(best)}\n\n{table}\n\n{picture}\n"


def _ranking(best: dict[str, tuple[Row, bool]]) -> str:
    """One or two sentences: who of those with the most seeds has the lowest loss, and how far the others are off."""
    rows = [row for row, _ in best.values()]
    most = max(row.seeds for row in rows)
    first = min((row for row in rows if row.seeds == most), key=lambda row: row.mean("after_task_loss"))

    def doubts(row: Row) -> str:
        edge = "" if best[row.label][1] else ", at the edge of its grid"
        return f"{row.seeds} seed{'s' * (row.seeds > 1)}{edge}"

    # by the seeds that both have: the same examples in the same order
    off = {
        row.label: row.mean("after_task_loss") - first.mean("after_task_loss", row.seeds)
        for row in rows
        if row is not first
    }
    ordered = sorted(off, key=off.get)
    behind = [f"{label} by {off[label]:.3f} ({doubts(best[label][0])})" for label in ordered if off[label] >= 0]
    before = [f"{label} by {-off[label]:.3f} ({doubts(best[label][0])})" for label in ordered if off[label] < 0]
    among = " of the methods with most seeds" if before else ""
    sentence = (
        f"Each at its best rate, {first.label} has the lowest task loss{among}, "
        f"{first.text('after_task_loss')} at {first.learning_rate:g} ({doubts(first)})"
    )
    sentence += ("; behind it are " + ", ".join(behind) if behind else "") + "."
    return sentence + (f" Before it are {', '.join(before)}." if before else "")


def _forgetting(experiment: dict[str, Any], rows: list[Row]) -> str:
    """What each method pays on untouched text for the same gain."""
    texts = _untouched(rows)
    found = {text: rises_at_gain(rows, text, _GAIN) for text in texts}
    target = next(iter(found.values()))[0]
    head = ["method", *(f"rise on {text}" for text in texts)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    labels = next(iter(found.values()))[1]
    for label in sorted(labels, key=lambda each: math.inf if labels[each] is None else labels[each]):
        cells = ["not reached" if each is None else f"{each:+.3f}" for each in (found[t][1][label] for t in texts)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return (
        f"### {experiment['title']}: the price of {_GAIN:.0%} of the largest gain\n\nThe rise of the loss on untouched "
        f"text where a method's curve over its rates first comes down to a task loss of {target:.3f}.\n\n{table}\n"
    )


def _untouched(rows: list[Row]) -> list[str]:
    return [text for text in _UNTOUCHED if any(f"before_{text}_loss" in row.figures for row in rows)]
