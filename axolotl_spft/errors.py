"""The errors that the package raises on bad input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 5


class SpftError(ValueError):
    """Bad input: the message names the key or file, the value, the rule and the remedy."""


class SpftConfigError(SpftError):
    """One or several problems of a configuration, reported together."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("spft configuration: " + "; ".join(self.problems))


class SpftFileError(SpftError):
    """An adapter or mask file that is damaged or belongs to another base model."""


class SpftMemoryError(SpftError):
    """The salience pass ran out of memory, on every rank of the run at once, so that it can be tried with less."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a name that is nearly one of the known ones, else nothing."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def first_of(items: Sequence[str], separator: str) -> str:
    """The first few items for a message, and how many more there are."""
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return separator.join([*items[:_SHOWN], *more])


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them: in order, the last two with "and"."""
    *first, last = sorted(names)
    return f"{', '.join(first)} and {last}" if first else last


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may have many, or none."""
    return str(error).strip().split("\n")[0]
