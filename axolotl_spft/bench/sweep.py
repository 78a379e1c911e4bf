"""The same comparison at several values of one option."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from axolotl_spft.bench.options import Options
from axolotl_spft.bench.rounds import compare
from axolotl_spft.bench.shapes import model_config
from axolotl_spft.errors import SpftError

SWEPT = {"tokens": int, "density": float, "width": int, "area": float}


def parse_values(over: str, texts: Sequence[str]) -> list[float]:
    """The values of a sweep.

    Raises:
        SpftError: there are none, or one is no number of the right kind.
    """
    if not texts:
        raise SpftError(f"`--sweep {over}` needs values: write them after it, as in `--sweep tokens 256 512 1024`")
    try:
        return [SWEPT[over](text) for text in texts]
    except ValueError as error:
        raise SpftError(f"`--sweep {over}`: {error}") from error


def options_at(options: Options, over: str, value: float) -> Options:
    """``options`` with another value of ``over``."""
    others = {"rank": None} if over == "density" else {}
    return replace(options, **others, **{over: value})


def sweep(
    options: Options, over: str, values: Sequence[float]
) -> Iterator[tuple[float, list[dict[str, Any]], dict[str, str]]]:
    """(value, rows, what was left out) of each comparison, as it is measured."""
    # all at once: a bad value must not cost the time of the good ones before it
    every = [options_at(options, over, value) for value in values]
    for each in every:
        model_config(each.model, each.tokens, each.width)
    return ((value, *compare(each)) for value, each in zip(values, tqdm(every, desc=f"Sweep of {over}")))
