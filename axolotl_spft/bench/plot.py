"""The figures as a picture, by matplotlib, which is no dependency of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl_spft.errors import SpftError
from axolotl_spft.files import atomic_path

Row = dict[str, Any]
_MIB = 2**20
# that the command promises
FORMATS = (".png", ".pdf", ".svg")
_PALE, _STRONG = "#9db4c0", "#1f6f8b"


def require_matplotlib() -> None:
    """Check that a picture can be drawn, before anything is measured.

    Raises:
        SpftError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpftError("`--plot` needs matplotlib: pip install matplotlib, or leave the option out") from error


def plot_comparison(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars: the median step with its interquartile range, and the bytes kept for backward."""
    figure, (left, right) = _panels(title, height=1.5 + 0.35 * len(rows))
    names = [row["method"] for row in rows]
    colours = [_STRONG if name.startswith("spft") else _PALE for name in names]
    milliseconds = [1000 * row["median_seconds"] for row in rows]
    spreads = [500 * row["spread"] * row["median_seconds"] for row in rows]
    left.barh(names, milliseconds, xerr=spreads, color=colours)
    limit = next((row["median_seconds"] for row in rows if row["method"] == "limit"), None)
    if limit is not None:
        left.axvline(1000 * limit, color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("median step, ms (lines: interquartile range)")
    right.barh(names, [row["kept_bytes"] / _MIB for row in rows], color=colours)
    right.set_xlabel("kept for backward, MiB")
    right.set_yticklabels([])
    for axes in (left, right):
        axes.invert_yaxis()
    _save(figure, path)


def plot_sweep(over: str, points: Sequence[tuple[float, list[Row], dict[str, str]]], path: Path, title: str) -> None:
    """Lines over the swept option: the median step, and the bytes kept for backward."""
    figure, (left, right) = _panels(title, height=4)
    names = dict.fromkeys(row["method"] for _, rows, _ in points for row in rows)
    for name in names:
        mine = [(value, row) for value, rows, _ in points for row in rows if row["method"] == name]
        values = [value for value, _ in mine]
        style = {"marker": "o", "label": name, "linestyle": ":" if name == "limit" else "-"}
        left.plot(values, [1000 * row["median_seconds"] for _, row in mine], **style)
        right.plot(values, [row["kept_bytes"] / _MIB for _, row in mine], **style)
    for axes, label in ((left, "median step, ms"), (right, "kept for backward, MiB")):
        axes.set_xscale("log")
        axes.set_xticks([value for value, *_ in points], [f"{value:g}" for value, *_ in points])
        axes.minorticks_off()
        axes.set_xlabel(over)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    left.legend()
    _save(figure, path)


def _panels(title: str, height: float) -> tuple[Any, Any]:
    # a figure of its own: pyplot would choose a screen and keep global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots(1, 2)


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.lstrip(".") or "png")
