"""The panels as a picture, by matplotlib, which is no dependency of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.files import atomic_path, check_writable
from axolotl_spft.inspection.inspect import Inspection
from axolotl_spft.inspection.panels import Curves, HeatMap, Histogram, sections, tick_step
from axolotl_spft.inspection.statistics import GRID

FORMATS = (".png", ".pdf", ".svg")
# pale to strong, as on the page
_COLOURS = ("#eef4f5", "#6fb1bf", "#0b4a63")
_ABSENT = "#d9d9d9"


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn to ``path``, before anything is read.

    Raises:
        SpftError: matplotlib is not installed.
        SpftFileError: nothing can be written there, or the ending names no format.
    """
    if path.suffix not in FORMATS:
        raise SpftFileError(f"`--picture {path}` must end with one of {', '.join(FORMATS)}")
    check_writable(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpftError("`--picture` needs matplotlib: pip install matplotlib, or use `--page`") from error


def draw(inspection: Inspection, path: Path) -> None:
    """Draw all panels, two in a row, under the title of each file."""
    # a figure of its own: pyplot would choose a screen and keep global state
    from matplotlib.figure import Figure

    parts = sections(inspection)
    rows = [(len(part.panels) + 1) // 2 for part in parts]
    figure = Figure(figsize=(12, sum(3.4 * count + 0.4 for count in rows)), layout="constrained")
    subfigures = figure.subfigures(len(parts), 1, height_ratios=[3.4 * count + 0.4 for count in rows], squeeze=False)
    for part, count, subfigure in zip(parts, rows, subfigures[:, 0]):
        subfigure.suptitle(part.title, fontsize="medium", wrap=True)
        axes = subfigure.subplots(count, 2, squeeze=False).flatten()
        for panel, each in zip(part.panels, axes):
            _draw(panel, each)
        for each in axes[len(part.panels) :]:
            each.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix.lstrip("."))
        if path.suffix == ".png":
            _shrink(temporary)


def _shrink(path: Path) -> None:
    """Store a PNG with a palette: a third of the bytes, and the eye sees no difference."""
    from PIL import Image

    with Image.open(path) as image:
        smaller = image.convert("RGB").quantize(256)
    smaller.save(path, format="PNG", optimize=True)


def _draw(panel: HeatMap | Curves | Histogram, axes: Any) -> None:
    axes.set_title(panel.title, fontsize="medium", loc="left")
    if isinstance(panel, HeatMap):
        _heat_map(panel, axes)
    elif isinstance(panel, Curves):
        _curves(panel, axes)
    else:
        axes.bar(panel.edges[:-1], panel.counts, width=panel.edges[1] - panel.edges[0], align="edge", color=_COLOURS[1])
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda exponent, _: f"{10**exponent:.2g}")
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)


def _heat_map(panel: HeatMap, axes: Any) -> None:
    import numpy
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("pale to strong", _COLOURS).with_extremes(bad=_ABSENT)
    cells = numpy.array([[numpy.nan if cell is None else cell for cell in row] for row in panel.cells])
    image = axes.imshow(cells, cmap=colours, vmin=0, vmax=panel.top, aspect="auto", interpolation="nearest")
    step = tick_step(len(panel.layers), 12)
    axes.set_xticks(range(0, len(panel.layers), step), panel.layers[::step])
    axes.set_yticks(range(len(panel.kinds)), panel.kinds)
    absent = any(cell is None for row in panel.cells for cell in row)
    axes.set_xlabel("layer (grey: no trained entry)" if absent else "layer")
    axes.figure.colorbar(image, ax=axes, label=panel.unit, format=lambda value, _: panel.form(value))


def _curves(panel: Curves, axes: Any) -> None:
    shares = [100 * share for share in GRID]
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", linewidth=1, label="even")
    for number, (name, line) in enumerate(panel.lines.items()):
        axes.plot(shares, [100 * held for held in line], label=name, linestyle="-" if number < 10 else "--")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xlim=(0, 100), ylim=(0, 102))
    axes.legend(fontsize="x-small", loc="lower right")
