"""Draws the page of all experiments, and a picture each, from the recorded lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl_spft.files import atomic_path
from integration.evidence.experiment import read_experiment
from integration.evidence.records import records_of
from integration.evidence.table import Row, best_rows, rows_of

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
_HEAD = """# Evidence on real models

Made by `python -m integration.evidence report` from the lines in `results/`; each experiment is a file of
`experiments/`. To repeat one: `python -m integration.evidence run integration/evidence/experiments/<name>.json
--data FOLDER`, where FOLDER holds GSM8K (openai/gsm8k) as JSON lines and ARC, OpenBookQA and BoolQ as JSON lists of
`instruction`, `output`, `answer`. `make evidence` repeats a small one in minutes.

Figures are losses per token on examples that were not trained on, after training; `±` is half of the range over the
seeds. Untouched text is of a kind that the task does not train: a method that lowers the task's loss and raises this
one forgets. The best rate of a method is bold; "edge" says that it is the first or last of those tried, so that a
better one may lie beyond.
"""


def write_report(experiments: Path, results: Path, output: Path) -> None:
    """Write ``README.md`` and ``<experiment>.png`` to ``output``; equal records give equal bytes of the page."""
    parts = [_HEAD]
    files = [(path, read_experiment(path)) for path in sorted(experiments.glob("*.json"))]
    records = records_of(results)
    for question, heading in _QUESTIONS.items():
        chosen = [(path, each) for path, each in files if each["question"] == question]
        with_rows = [(path, each, rows_of(each, records)) for path, each in chosen]
        with_rows = [(path, each, rows) for path, each, rows in with_rows if rows]
        if with_rows:
            parts.append(f"## {question}. {heading}\n")
        for path, experiment, rows in with_rows:
            parts.append(_section(path.stem, experiment, rows))
            _draw(output / f"{path.stem}.png", experiment["title"], rows)
    with atomic_path(output / "README.md") as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _section(name: str, experiment: dict[str, Any], rows: list[Row]) -> str:
    untouched = [text for text in _UNTOUCHED if any(f"before_{text}_loss" in row.figures for row in rows)]
    judged = any("before_accuracy" in row.figures for row in rows)
    head = ["method", "trained", "rate", "seeds", "task loss", *[f"{text} loss" for text in untouched]]
    head += ["accuracy"] * judged + ["step"]
    best = best_rows(rows)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        when = "before" if row.method == "none" else "after"
        chosen, inner = best.get(row.label, (None, True))
        rate = f"{row.learning_rate:g}" if row.learning_rate else ""
        if row is chosen:
            rate = f"**{rate}**" + ("" if inner else " (edge)")
        seeds = len(row.figures[f"{when}_task_loss"])
        cells = [row.label, f"{row.trained:,}", rate, f"{seeds} of {row.wanted}" if seeds < row.wanted else str(seeds)]
        cells += [row.text(f"{when}_{name}_loss") for name in ("task", *untouched)]
        if judged:
            cells.append(row.text(f"{when}_accuracy"))
        step = row.mean("step_seconds")
        cells.append("" if step is None else f"{step:.2f} s")
        lines.append(f"| {' | '.join(cells)} |")
    setting = (
        f"`{experiment['base']}`, {experiment.get('bits', 16)} bits, {experiment['task']}, "
        f"{experiment.get('steps', 80)} steps of {experiment.get('batch', 8)}; `experiments/{name}.json`"
    )
    conclusion = experiment.get("conclusion", "Not all of it has been run yet: no conclusion.")
    table = "\n".join(lines)
    return (
        f"### {experiment['title']}\n\n{setting}.\n\n{table}\n\n![{experiment['title']}]({name}.png)\n\n{conclusion}\n"
    )


def _draw(path: Path, title: str, rows: list[Row]) -> None:
    """Task loss against the loss of untouched text: a curve over the rates for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=100, layout="constrained")
    text = next((each for each in _UNTOUCHED if f"before_{each}_loss" in rows[0].figures), None)
    for label in dict.fromkeys(row.label for row in rows):
        curve = sorted((row for row in rows if row.label == label), key=lambda row: row.learning_rate)
        when = "before" if curve[0].method == "none" else "after"
        if text is None:
            x, y = [row.learning_rate for row in curve], [row.mean(f"{when}_task_loss") for row in curve]
        else:
            x = [row.mean(f"{when}_task_loss") for row in curve]
            y = [row.mean(f"{when}_{text}_loss") for row in curve]
        axes.plot(x, y, marker="o", label=label)
        if text is not None:
            for row, at in zip(curve, zip(x, y)):
                if row.learning_rate:
                    axes.annotate(f"{row.learning_rate:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("learning rate" if text is None else "loss on the task (lower is better)")
    axes.set_ylabel("loss on the task" if text is None else f"loss on untouched {text} (lower is better)")
    if text is None:
        axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)
