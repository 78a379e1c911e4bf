"""The block ``reselect`` of a dynamic mask: its keys, their defaults and their rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from axolotl_spft.errors import did_you_mean
from axolotl_spft.metrics import METRICS, ON_THE_WAY

VALUE, VALUE_GRADIENT = "value", "value_gradient"
EXAMPLE = "{every: 200, fraction: 0.2, until: 0.75}"


class Reselect(NamedTuple):
    """How a mask changes while it is trained.

    Attributes:
        every: optimizer steps from one re-selection to the next.
        fraction: share of each matrix' values that is exchanged, rounded down.
        until: share of the run's steps after which the mask stays as it is.
        collect: micro-batches of the step, its last ones, whose dense gradient says where to grow.
        drop: the values with the smallest |value| are dropped, or those with the smallest |value x gradient|.
    """

    every: int
    fraction: float = 0.2
    until: float = 0.75
    collect: int = 1
    drop: str = VALUE

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the mask changes after optimizer step ``step`` (from 1) of ``steps``."""
        return step % self.every == 0 and step <= self.until * steps and step < steps


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "every": (_is_count, "must be a whole number of optimizer steps, at least 1"),
    "fraction": (_is_share, "must be a number in [0, 1]"),
    "until": (_is_share, "must be a number in [0, 1]"),
    "collect": (_is_count, "must be a whole number of micro-batches, at least 1"),
    "drop": (lambda v: v in (VALUE, VALUE_GRADIENT), f"must be {VALUE} or {VALUE_GRADIENT}"),
}


def problems_of_block(block: Mapping[str, Any]) -> list[str]:
    """Every problem of the keys in the block ``reselect``, one sentence each."""
    problems = []
    for name, value in block.items():
        if name not in _RULES:
            hint = did_you_mean(name, _RULES)
            problems.append(f"`reselect` has the unknown key `{name}`{hint}: its keys are {', '.join(_RULES)}")
        elif not _RULES[name][0](value):
            problems.append(f"`reselect.{name}: {value}` {_RULES[name][1]}")
    if "every" not in block:
        problems.append(f"`reselect` needs `every`, the optimizer steps from one re-selection to the next: {EXAMPLE}")
    return problems


def problems_beside(options: Mapping[str, Any]) -> list[str]:
    """What among the other options cannot work with the block ``reselect``, one sentence each."""
    problems = []
    salience = options.get("salience") or "gradient"
    if salience in METRICS and salience not in ON_THE_WAY:
        problems.append(
            "`reselect` grows where the salience of the training's own gradients is largest, and "
            f"`salience: {salience}` is not made of these: use one of {', '.join(ON_THE_WAY)}, or leave `reselect` out"
        )
    if options.get("pattern") == "block":
        problems.append(
            "`reselect` exchanges single entries, which would tear the blocks of `pattern: block`: write "
            "`pattern: element`, or leave `reselect` out"
        )
    return problems
