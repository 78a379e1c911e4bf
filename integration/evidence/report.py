"""Draws the page of all experiments, and a picture each, from the recorded lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_spft.files import atomic_path
from axolotl_spft.tuner.step_unit import unit
from integration.evidence.comparison import prices, ranking, rises, uncertainty_of_start
from integration.evidence.experiment import DEFAULTS, Records, queue, read_experiment
from integration.evidence.picture import draw
from integration.evidence.plan import plan
from integration.evidence.records import records_of
from integration.evidence.table import Row, best_rows, difference, markdown, rows_of

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

**The models and data are small.** The line above each table says how many answers are judged and how long an example
may be, which leaves most of GSM8K out. Both pretrained models come from packages with about 4 bits a weight: "16 bits"
is their dequantized form, and NF4 rounds that once more.

**How a run is made.** Its learning rate rises over its first tenth and then falls to 0; gradients are clipped to a norm
of 1. All methods train the linear layers of the blocks (attention and MLP, unless a row says otherwise), full
fine-tuning too: embeddings and norms stay. Sparse values, LoRA's factors and what full fine-tuning trains are float32,
the rest of the base is bfloat16 under autocast; in the docstring experiment all is float32. LoRA's alpha is 2 r where
no other is named. `trained` is how many values that is: methods are compared at similar, not always equal, numbers.
Masks are chosen by one sample of the rows that are trained.

**How it is judged.** Losses are means over the tokens of answers that were not trained on, their end included.
`english` and `python` are texts that no run trains: bare questions of another of the data sets (ARC-Easy's beside
GSM8K, GSM8K's beside ARC and BoolQ), and pieces of the Python standard library. A method that lowers the task's loss
and raises these forgets. `accuracy` is how often the right choice has the lowest loss a character, its end included;
the untouched model has never seen that form of an answer.

**Seeds and rates.** A seed is an order of the examples, and what a method draws (factors, a random mask); it changes
neither the judged answers nor the sample that other masks are chosen by. Behind a loss, `±` is half of the range over
the seeds. Seeds are easy or hard for all methods alike, so that methods are compared seed by seed: behind a difference
or a rise, `±` is the standard error of its mean over the seeds. What the answers that happen to be judged add to
it is not in there. Bold is the rate that was best with the first seed, by the judged answers, for all methods alike;
only this rate has the other seeds, and a rate beside it may look lower because the first seed is an easy one. So each
difference stands without that seed too. "edge" says that the best rate is the first or last of those tried, so that a
better one may lie beyond. `units` are those of `relative_step: true`: rms(W) x (0.005 / density)^0.75, where rms(W) is
the root mean square of the trained matrices' weights.
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
            sections = [_forgetting(experiment, rows) for _, experiment, rows in measured if _untouched(rows)]
        else:
            sections = [_section(*each, _targets_of(each[1]["base"], records)) for each in measured
                        if each[1]["question"] == question]  # fmt: skip
        parts += sections or ["Not measured yet.\n"]
    for name, experiment, rows in measured:
        draw(output / f"{name}.png", experiment["title"], rows, next(reversed(_untouched(rows)), None))
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
    # full fine-tuning trains all of them, a sparse method this share
    entries = (
        each["result"]["trained"] / each["options"].get("density", 1.0)
        for each in of_base
        if each["method"] == "full" or "density" in each["options"]
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
        "over the best rate",
        *[f"{text} loss" for text in untouched],
        *["accuracy"] * judged,
    ]
    best = best_rows(rows)
    # the unit is that of all matrices together
    elsewhere = {each["label"] for each in experiment["methods"] if "target_modules" in each.get("options", {})}
    lines = []
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
        over = None if chosen is None or row is chosen else difference(row.losses, chosen.losses)
        cells += [row.text(f"{when}_task_loss"), "" if over is None else f"{over.mean:+.3f}"]
        cells += [row.text(f"{when}_{name}_loss") for name in untouched]
        if judged:
            cells.append(row.text(f"{when}_accuracy"))
        lines.append(cells)
    settings = DEFAULTS | experiment
    texts = f", {settings['texts']} texts of each other kind" if len(untouched) > 1 else ""
    setting = (
        f"`{experiment['base']}`, {settings['bits']} bits, {experiment['task']}, {settings['steps']} steps of "
        f"{settings['batch']} examples of at most {settings['length']} tokens, {settings['judged']} judged{texts}; "
        f"`experiments/{name}.json`"
    )
    if targets:
        setting += f"; rms(W) is {targets.rms:.3f}"
    trained_on = next((each for row in rows for each in row.figures.get("train_rows", {}).values()), None)
    if trained_on is not None:
        setting += f". {trained_on:,} rows of the training set are that short"
    if apart := uncertainty_of_start(rows, untouched):
        setting += f". The untouched model's losses differ by up to {apart:.3f} between the runs' machines and releases"
    reference = experiment.get("reference")
    if reference not in best:
        reference = next(iter(best))
    picture = f"![{experiment['title']}]({name}.png)"
    parts = [f"### {experiment['title']}", f"{setting}.", ranking(best, reference), markdown(head, lines), picture]
    return "\n\n".join(parts) + "\n"


def _forgetting(experiment: dict[str, Any], rows: list[Row]) -> str:
    """What each method does to untouched text."""
    texts = _untouched(rows)
    head = (
        f"### {experiment['title']}: what it does to other text\n\nEach method at its best rate; the rise is over the "
        f"base's loss, ± its standard error over the seeds."
    )
    return "\n\n".join([head, rises(best_rows(rows), rows, texts), prices(rows, texts, _GAIN)]) + "\n"


def _untouched(rows: list[Row]) -> list[str]:
    return [text for text in _UNTOUCHED if any(f"before_{text}_loss" in row.figures for row in rows)]
