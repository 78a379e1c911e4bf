"""The picture of an experiment: what a method reaches at which rate, and what it pays for that elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from axolotl_spft.files import atomic_path
from integration.evidence.table import Row, shared_seeds

# share of the largest gain
_SHOWN = 0.15
# with 20 colours, enough for every curve of an experiment to have a look of its own
_MARKERS = "osv^DX"


def draw(path: Path, title: str, rows: Sequence[Row], untouched: str | None) -> None:
    """Task loss over the rates; beside it, where there is untouched text, its loss over the task loss.

    A curve is a method over its rates, of the seeds that all of them have. Runs that diverged have no place in it, and
    those that lost more than 15% of the largest gain lie outside.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 1 if untouched is None else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(5.5 * panels + 2.5, 5), dpi=100, layout="constrained", squeeze=False
    )
    over_rates, over_loss = axes[0, 0], axes[0, -1]
    colors = plt.get_cmap("tab20").colors
    trained = [row for row in rows if row.seeds and math.isfinite(row.mean("after_task_loss"))]
    # what lies further off would leave no room for the differences
    best = min((loss for row in trained for loss in row.figures["after_task_loss"].values()), default=0.0)
    worst = best + _SHOWN * max((row.mean("before_task_loss") - best for row in trained), default=1.0)
    seen = []
    for number, label in enumerate(dict.fromkeys(row.label for row in trained)):
        curve = sorted((row for row in trained if row.label == label), key=lambda row: row.learning_rate)
        style = {
            "marker": _MARKERS[number // len(colors) % len(_MARKERS)],
            "color": colors[number % len(colors)],
            "linestyle": "-" if curve[0].method == "spft" else "--",
        }
        # a mean of other seeds at one rate would bend the curve there
        shared = shared_seeds(curve)
        rates, losses = [row.learning_rate for row in curve], [row.mean("after_task_loss", shared) for row in curve]
        over_rates.plot(rates, losses, label=label, **style)
        if untouched is not None:
            others = [row.mean(f"after_{untouched}_loss", shared) for row in curve]
            over_loss.plot(losses, others, **style)
            seen += [other for loss, other in zip(losses, others) if loss <= worst]
    over_rates.set(xscale="log", xlabel="learning rate", ylabel="loss on the task (lower is better)")
    over_rates.set_ylim(*_with_margin([best, worst]))
    if untouched is not None and trained:
        base = next((row for row in rows if row.method == "none"), trained[0])
        before = base.mean(f"before_{untouched}_loss")
        over_loss.axhline(before, color="grey", linewidth=0.8, linestyle=":", label="base")
        over_loss.set(
            xlabel="loss on the task (lower is better)", ylabel=f"loss on untouched {untouched} (lower is better)"
        )
        over_loss.set_xlim(*_with_margin([best, worst]))
        over_loss.set_ylim(*_with_margin([before, *seen]))
    figure.legend(loc="outside right center", fontsize=8)
    seeds = sorted(shared_seeds(trained)) if trained else []
    figure.suptitle(f"{title} (seed {', '.join(map(str, seeds))})", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin
