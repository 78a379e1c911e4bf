"""What the picture and the page draw, as numbers: heat maps, curves and a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_spft.inspection.inspect import Inspection
from axolotl_spft.inspection.overlap import total
from axolotl_spft.inspection.statistics import Figures, MatrixFigures, by_kind, concentration, figures_of
from axolotl_spft.inspection.text import number
from axolotl_spft.module_types import layers_in_order

BINS = 48


@dataclass(frozen=True)
class HeatMap:
    """Layers by module types.

    Attributes:
        unit: what a cell's number is, for the colour scale.
        cells: for each module type a number for each layer; None where there is no such matrix, or nothing to tell.
        top: the end of the colour scale, which begins at 0.
        form: a number as text.
    """

    title: str
    unit: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    top: float
    form: Callable[[float], str]


@dataclass(frozen=True)
class Curves:
    """Lines over `GRID` of `statistics`, both axes shares from 0 to 1; the diagonal is an even spread."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Histogram:
    """Counts between ``edges`` (bins + 1), which are decimal logarithms."""

    title: str
    x_label: str
    y_label: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """The panels about one file, or about two together."""

    title: str
    panels: tuple[HeatMap | Curves | Histogram, ...]


def sections(inspection: Inspection) -> list[Section]:
    """A section for each file, and one for the overlap of two."""
    found = [
        Section(file.title, tuple(_panels(figures, inspection.has_base)))
        for file, figures in zip(inspection.files, inspection.figures)
    ]
    if inspection.overlaps is not None:
        figures = [each for each in inspection.figures[0] if each.report.name in inspection.overlaps]
        jaccard = _heat_map(
            "Overlap of the two masks",
            "Jaccard: shared entries / entries of either",
            figures,
            lambda group: total(inspection.overlaps[each.report.name] for each in group).jaccard,
            "{:.2f}".format,
            top=1.0,
        )
        found.append(Section("Both files", (jaccard,)))
    return found


def _panels(figures: Sequence[MatrixFigures], has_base: bool) -> Iterator[HeatMap | Curves | Histogram]:
    def of(read: Callable[[Figures], float | None]) -> Callable[[Sequence[MatrixFigures]], float | None]:
        return lambda group: read(figures_of(group))

    yield _heat_map("Density", "selected entries, % of all", figures, of(lambda f: f.coverage.density), _percent)
    yield _heat_map("Area", "used rows x used columns, % of all", figures, of(lambda f: f.coverage.area), _percent)
    if all(each.magnitudes is not None for each in figures):
        mean = of(lambda f: f.values.mean if f.values else None)
        yield _heat_map("Size of the values", "mean |s| of the trained entries", figures, mean, number)
        if has_base:
            norm = of(lambda f: f.values.relative_norm if f.values else None)
            yield _heat_map("Change of the weights", "norm of S / norm of W, %", figures, norm, _percent)
    for side in ("rows", "columns"):
        lines = {kind: concentration(group, side) for kind, group in by_kind(figures).items()}
        yield Curves(
            f"Concentration on {side}",
            f"fullest {side}, % of all {side}",
            "entries that they hold, %",
            {kind: tuple(line.tolist()) for kind, line in lines.items() if line is not None},
        )
    magnitudes = [each.magnitudes for each in figures if each.magnitudes is not None]
    if magnitudes:
        histogram = _histogram(torch.cat(magnitudes))
        if histogram:
            yield histogram


def _heat_map(
    title: str,
    unit: str,
    figures: Sequence[MatrixFigures],
    measure: Callable[[Sequence[MatrixFigures]], float | None],
    form: Callable[[float], str],
    top: float | None = None,
) -> HeatMap:
    layers = tuple(layers_in_order(each.place for each in figures))
    kinds = tuple(by_kind(figures))
    groups: dict[tuple[str, str], list[MatrixFigures]] = {}
    for each in figures:
        groups.setdefault((each.place.kind, each.place.layer), []).append(each)
    cells = tuple(
        tuple(measure(groups[kind, layer]) if (kind, layer) in groups else None for layer in layers) for kind in kinds
    )
    largest = max((cell for row in cells for cell in row if cell is not None), default=0.0)
    return HeatMap(title, unit, layers, kinds, cells, top or round_up(largest), form)


def round_up(value: float) -> float:
    """The next of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten: a good end for a scale from 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * power for step in steps if step * power >= value * (1 - 1e-9))


def tick_step(count: int, most: int) -> int:
    """How far apart at most ``most`` ticks stand over ``count`` places: 1, 2, 5, 10, 20, ..."""
    steps = (mantissa * 10**power for power in range(12) for mantissa in (1, 2, 5))
    return next(step for step in steps if step * most >= count)


def _percent(share: float) -> str:
    return f"{number(100 * share)}%"


def _histogram(magnitudes: Tensor) -> Histogram | None:
    """Of the |values| that are not 0, on a logarithmic axis over at most six decades below the largest."""
    logarithms = magnitudes[magnitudes > 0].log10()
    if not logarithms.numel():
        return None
    high = math.ceil(10 * logarithms.max().item()) / 10
    low = max(math.floor(10 * logarithms.min().item()) / 10, high - 6)
    low = min(low, high - 0.2)
    counts = torch.histc(logarithms.clamp(min=low), BINS, low, high)
    zeros = int((magnitudes == 0).sum())
    beside = f" ({zeros:,} are exactly 0)" if zeros else ""
    edges = tuple(low + (high - low) * step / BINS for step in range(BINS + 1))
    return Histogram("Values", f"|s|, logarithmic{beside}", "entries", edges, tuple(int(count) for count in counts))
