"""Tables of methods beside each other, each at its best rate: who is ahead on the task, and who forgets what for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from integration.evidence.table import Best, Difference, Row, difference, markdown, prices_of_gain, shared_seeds

# losses of one model, which processors and releases round differently, lie as near to each other as the first of these;
# a start that is further from the base than the second is another model's
_ROUNDING, _MOVED = 0.005, 0.02
_LOSS = "after_task_loss"


def ranking(best: Best, reference: str) -> str:
    """The methods in the order of their task loss, by its paired difference to that of the method ``reference``."""
    beside = best[reference][0]
    lines = []
    for label, (row, inner) in best.items():
        off = difference(row.losses, beside.losses)
        unsearched = difference(_without(row), _without(beside))
        cells = [label, f"{row.trained:,}", f"{row.learning_rate:g}" + " (edge)" * (not inner)]
        cells += [row.text(_LOSS), *(["", ""] if row is beside else [_with_seeds(off), _text(unsearched)])]
        lines.append((0.0 if off is None else off.mean, cells))
    head = ["method", "trained", "best rate", "task loss", f"less that of {reference}", "without the first seed"]
    return markdown(head, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def rises(best: Best, rows: Sequence[Row], texts: Sequence[str]) -> str:
    """What each method's loss on untouched ``texts`` is over the base's, and over its own at the start if it moved."""
    base = next((row for row in rows if row.method == "none"), None)
    moved = base is not None and any(abs(_off(row, base, text)) > _MOVED for row, _ in best.values() for text in texts)
    lines = []
    for label, (row, _) in best.items():
        cells, last = [label, row.text(_LOSS)], math.inf
        for text in texts:
            after, before = row.figures[f"after_{text}_loss"], row.figures[f"before_{text}_loss"]
            over = before if base is None else dict.fromkeys(after, base.mean(f"before_{text}_loss"))
            rise = difference(after, over)
            last = rise.mean
            cells += [str(rise), *[str(difference(after, before))] * moved]
        lines.append((last, cells))
    head = ["method", "task loss"]
    for text in texts:
        head += [f"rise on {text}", *[f"{text}, over its own start"] * moved]
    return markdown(head, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def prices(rows: Sequence[Row], texts: Sequence[str], share: float) -> str:
    """What each method pays on untouched ``texts`` for one and the same gain, read off its curve over the rates."""
    found = {text: prices_of_gain(rows, text, share) for text in texts}
    target, of_last = found[texts[-1]]
    lines = []
    for label in sorted(of_last, key=lambda each: math.inf if of_last[each] is None else of_last[each].rise):
        of_label = [found[text][1][label] for text in texts]
        lines.append([label, *("not reached" if each is None else f"{each.rise:+.3f}{' ~' * each.below_grid}"
                               for each in of_label)])  # fmt: skip
    count = len(shared_seeds([row for row in rows if row.seeds]))
    return (
        f"The same at equal gain: the point of each method's curve over its rates where the task loss is {target:.3f}, "
        f"{share:.0%} of the largest gain, between two rates on the straight line ({count} seed{'s' * (count > 1)}). "
        f"`~`: it lies below the lowest rate tried.\n\n"
        + markdown(["method", *(f"rise on {text}" for text in texts)], lines)
    )


def uncertainty_of_start(rows: Sequence[Row], texts: Sequence[str]) -> float:
    """How far the judged losses of what is one untouched model lie apart: processors and releases round differently."""
    base = next((row for row in rows if row.method == "none"), None)
    off = [] if base is None else [abs(_off(row, base, text)) for row in rows for text in ("task", *texts)]
    return max((each for each in off if each <= _ROUNDING), default=0.0)


def _without(row: Row) -> dict[int, float]:
    return {seed: loss for seed, loss in row.losses.items() if seed not in row.searched}


def _off(row: Row, base: Row, text: str) -> float:
    return row.mean(f"before_{text}_loss") - base.mean(f"before_{text}_loss")


def _text(found: Difference | None) -> str:
    return "" if found is None else str(found)


def _with_seeds(found: Difference | None) -> str:
    return "" if found is None else f"{found} ({found.seeds} seed{'s' * (found.seeds > 1)})"
