"""Draws the page of all experiments, and a picture each, from the recorded lines."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_spft.files import atomic_path
from axolotl_spft.tuner.step_unit import unit
from integration.evidence.experiment import DEFAULTS, Records, queue, read_experiment
from integration.evidence.picture import draw
from integration.evidence.plan import plan
from integration.evidence.records import records_of
from integration.evidence.table import Row, best_rows, prices_of_gain, rows_of, shared_seeds

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
`experiments/`. To repeat them, on a GPU or a CPU:

```sh
python -m integration.evidence run --results FOLDER
python -m integration.evidence report --results FOLDER --output FOLDER
```

Without `--results` only what is left here is run and added. The data come from the hub (GSM8K, ARC, OpenBookQA, BoolQ),
or with `--data FOLDER` from its files `gsm8k_train.jsonl` (`question`, `answer`), `ARC-Easy_train.json` (`instruction`,
`answer`) and their like for `test`. A run may be stopped and started again, and several may work side by side. `make
evidence` repeats a small experiment in minutes.

The models are small, and so are the tests: the line above each table says how many answers are judged, and how long an
example may be, which leaves most of GSM8K out. Both pretrained models come from packages with about 4 bits a weight:
"16 bits" is their dequantized form, and NF4 rounds that once more.

Losses are means over the tokens of answers that were not trained on, after training. `±` is half of the range over the
seeds; these change the order of the examples and what is drawn (factors, random masks), not the answers that are
judged. Rates are chosen by the judged answers with the first seed, for all methods alike; what a difference is without
that seed stands beside it. Differences are between runs of the same seeds. The bold rate is a method's best, and the
one that has all seeds: a neighbour with one of them may have a lower figure beside it. "edge" says that the best rate
is the first or last of those tried, so that a better one may lie beyond.

Masks are chosen by some of the rows that are trained. A run's learning rate rises over its first tenth and then falls
to 0; gradients are clipped to a norm of 1; LoRA's alpha is 2 r. The column `trained` says how near to LoRA's count of
values a density comes. Untouched text is of a kind that the task does not train: a method that lowers the task's loss
and raises this one forgets.
"""


def write_report(experiments: Path, results: Path, output: Path) -> None:
    """Write ``README.md`` and ``<experiment>.png`` to ``output``; equal records give equal bytes of the page."""
    records = records_of(results)
    parts, measured = [_HEAD, *_in_short(results)], []
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


def _in_short(results: Path) -> list[str]:
    """What was concluded from the recorded lines, which lies beside them as question -> sentences."""
    path = results / "conclusions.json"
    if not path.is_file():
        return []
    conclusions = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for question, text in sorted(conclusions.items()):
        heading = f"{question}. {_QUESTIONS[question]}"
        anchor = heading.lower().replace(".", "").replace(" ", "-")
        lines.append(f"- **[{heading}](#{anchor}).** {text}")
    return ["## In short\n\n" + "\n".join(lines) + "\n"]


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
    of_base = [each for each in records.values() if each["base"] == base and "target_modules" not in each["options"]]
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
    head += ["accuracy"] * judged
    best = best_rows(rows)
    # the unit is that of all matrices together
    elsewhere = {each["label"] for each in experiment["methods"] if "target_modules" in each.get("options", {})}
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        when = "before" if row.method == "none" else "after"
        chosen, inner = best.get(row.label, (None, True))
        rate = f"{row.learning_rate:g}" if row.learning_rate else ""
        if row is chosen:
            rate = f"**{rate}**" + ("" if inner else " (edge)")
        cells = [row.label, f"{row.trained:,}", rate]
        if targets:
            known = row.method == "spft" and row.label not in elsewhere
            cells.append(f"{row.learning_rate / targets.unit(row.trained):.2g}" if known else "")
        seeds, wanted = len(row.seeds) or 1, len(row.wanted)
        cells.append(f"{seeds} of {wanted}" if seeds < wanted else str(seeds))
        cells += [row.text(f"{when}_{name}_loss") for name in ("task", *untouched)]
        if judged:
            cells.append(row.text(f"{when}_accuracy"))
        lines.append(f"| {' | '.join(cells)} |")
    settings = DEFAULTS | experiment
    texts = f", {settings['texts']} texts of each other kind" if len(untouched) > 1 else ""
    setting = (
        f"`{experiment['base']}`, {settings['bits']} bits, {experiment['task']}, {settings['steps']} steps of "
        f"{settings['batch']} examples of at most {settings['length']} tokens, {settings['judged']} judged{texts}; "
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
    most = max(len(row.seeds) for row in rows)
    first = min((row for row in rows if len(row.seeds) == most), key=lambda row: row.mean("after_task_loss"))

    def off_by(row: Row, seeds: Set[int]) -> float:
        return row.mean("after_task_loss", seeds) - first.mean("after_task_loss", seeds)

    def doubts(row: Row) -> str:
        both = row.seeds & first.seeds
        others = both - row.searched
        alone = f"; {off_by(row, others):+.3f} without the first" if row is not first and others else ""
        edge = "" if best[row.label][1] else ", at the edge of its grid"
        return f"{len(both)} seed{'s' * (len(both) > 1)}{alone}{edge}"

    # by the seeds that both have: the same examples in the same order
    off = {row.label: off_by(row, row.seeds & first.seeds) for row in rows if row is not first}
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
    found = {text: prices_of_gain(rows, text, _GAIN) for text in texts}
    target, labels = next(iter(found.values()))
    head = ["method", *(f"rise on {text}" for text in texts)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]

    def total(label: str) -> float:
        prices = [found[text][1][label] for text in texts]
        return math.inf if None in prices else sum(price.rise for price in prices)

    for label in sorted(labels, key=total):
        prices = [found[text][1][label] for text in texts]
        cells = ["not reached" if each is None else f"{each.rise:+.3f}{' ~' * each.below_grid}" for each in prices]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    count = len(shared_seeds([row for row in rows if row.seeds]))
    return (
        f"### {experiment['title']}: the price of {_GAIN:.0%} of the largest gain\n\nThe rise over the base's loss on "
        f"untouched text where a method's curve over its rates first comes down to a task loss of {target:.3f} "
        f"({count} seed{'s' * (count > 1)}); `~`: read off below the lowest rate tried.\n\n{table}\n"
    )


def _untouched(rows: list[Row]) -> list[str]:
    return [text for text in _UNTOUCHED if any(f"before_{text}_loss" in row.figures for row in rows)]
