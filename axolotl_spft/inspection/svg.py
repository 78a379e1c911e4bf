"""The panels as SVG for the page: colours and text sizes are those of its style sheet."""

from __future__ import annotations

import math
from html import escape

from axolotl_spft.inspection.panels import Curves, HeatMap, Histogram, round_up, tick_step
from axolotl_spft.inspection.statistics import GRID

# of a drawing, which the page stretches to the width of its column
WIDTH = 560
_CHARACTER, _LINE = 7.2, 20
_LEFT, _RIGHT, _TOP = 58, 14, 10


def draw(panel: HeatMap | Curves | Histogram) -> str:
    """The panel as an ``<svg>`` element."""
    if isinstance(panel, HeatMap):
        return _heat_map(panel)
    return _curves(panel) if isinstance(panel, Curves) else _histogram(panel)


def _heat_map(panel: HeatMap) -> str:
    left = min(WIDTH * 0.4, 16 + _CHARACTER * max(len(kind) for kind in panel.kinds))
    long_labels = any(not layer.isdigit() and len(layer) > 3 for layer in panel.layers)
    width = min((WIDTH - left - _RIGHT) / len(panel.layers), 96)
    height = 22 if len(panel.kinds) <= 24 else 16
    gap = 0.6 if width > 6 else 0
    parts = []
    for row, (kind, cells) in enumerate(zip(panel.kinds, panel.cells)):
        y = _TOP + row * height
        parts.append(_text(left - 8, y + height / 2, _shortened(kind, left - 16), "end"))
        for column, (layer, cell) in enumerate(zip(panel.layers, cells)):
            x = left + column * width
            told = "no trained entry" if cell is None else panel.form(cell)
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{width - gap:.2f}" height="{height - 0.6}" {_fill(cell, panel.top)}>'
                f"<title>{escape(f'{kind}, layer {layer}: {told}')}</title></rect>"
            )
            if width >= 50 and cell is not None:
                ground = "pale" if cell < 0.5 * panel.top else "middle" if cell < 0.58 * panel.top else "strong"
                parts.append(_text(x + width / 2, y + height / 2, told, "middle", f"on-{ground}"))
    bottom = _TOP + len(panel.kinds) * height
    most = max(1, int((WIDTH - left - _RIGHT) / (110 if long_labels else 32)))
    step = tick_step(len(panel.layers), most)
    for column, layer in enumerate(panel.layers):
        if column % step == 0:
            label = _shortened(layer, 105 if long_labels else 60)
            parts.append(_text(left + (column + 0.5) * width, bottom + 12, label, "middle"))
    parts.append(_text(left, bottom + 12 + _LINE, "layer", "start", "name"))
    y = bottom + 24 + _LINE
    bar = min(260, WIDTH - left - _RIGHT - 130)
    stripes = 40
    for stripe in range(stripes):
        share = (stripe + 0.5) / stripes
        parts.append(
            f'<rect x="{left + bar * stripe / stripes:.2f}" y="{y}" width="{bar / stripes + 0.4:.2f}" height="10" '
            f"{_fill(share, 1)}/>"
        )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "middle")):
        parts.append(_text(left + bar * share, y + 21, panel.form(panel.top * share), anchor))
    parts.append(_text(left, y + 21 + _LINE, panel.unit, "start", "name"))
    if any(cell is None for row in panel.cells for cell in row):
        x = left + bar + 40
        parts.append(f'<rect x="{x:.2f}" y="{y}" width="12" height="10" class="absent"/>')
        parts.append(_text(x + 18, y + 6, "no entry", "start"))
    return _svg(panel.title, y + 21 + _LINE + 12, parts)


def _fill(value: float | None, top: float) -> str:
    if value is None:
        return 'class="absent"'
    return f'style="--at:{100 * min(max(value / top, 0.0), 1.0):.0f}%" class="heat"'


def _curves(panel: Curves) -> str:
    height, names = 250, ["even spread", *panel.lines]
    right = WIDTH - min(44 + _CHARACTER * max(len(name) for name in names), 220)
    parts = _axes(right, height, [(share / 5, f"{20 * share}") for share in range(6)], "x")
    parts += _axes(right, height, [(share / 5, f"{20 * share}") for share in range(6)], "y")
    parts.append(_line([(0, 0), (1, 1)], right, height, "even"))
    for number, line in enumerate(panel.lines.values()):
        parts.append(_line(list(zip(GRID, line)), right, height, f"line c{number % 8}{' again' if number > 7 else ''}"))
    step = min(_LINE, (height - 6) / len(names))
    for row, name in enumerate(names):
        style = "even" if row == 0 else f"line c{(row - 1) % 8}{' again' if row > 8 else ''}"
        y = _TOP + 8 + row * step
        parts.append(f'<path d="M{right + 14:.1f} {y:.1f}h18" class="{style}"/>')
        parts.append(_text(right + 38, y, _shortened(name, WIDTH - right - 38), "start"))
    return _svg(panel.title, height + 62, [*parts, *_names(panel.x_label, panel.y_label, right, height)])


def _line(points: list[tuple[float, float]], right: float, height: float, style: str) -> str:
    placed = [f"{_LEFT + x * (right - _LEFT):.1f},{_TOP + _LINE + (1 - y) * (height - _LINE):.1f}" for x, y in points]
    return f'<polyline points="{" ".join(placed)}" class="{style}"/>'


def _histogram(panel: Histogram) -> str:
    height, right = 250, WIDTH - _RIGHT
    low, high = panel.edges[0], panel.edges[-1]
    top = round_up(max(panel.counts))
    parts = []
    for at, count in enumerate(panel.counts):
        x = [_LEFT + (panel.edges[at + side] - low) / (high - low) * (right - _LEFT) for side in (0, 1)]
        tall = count / top * (height - _LINE)
        between = f"{10 ** panel.edges[at]:.2g} to {10 ** panel.edges[at + 1]:.2g}: {count:,}"
        parts.append(
            f'<rect x="{x[0]:.2f}" y="{_TOP + height - tall:.2f}" width="{x[1] - x[0] - 0.5:.2f}" height="{tall:.2f}" '
            f'class="bar"><title>{between}</title></rect>'
        )
    ticks: list[float] = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    if len(ticks) < 2:
        ticks = [low + (high - low) * part / 4 for part in range(5)]
    parts += _axes(right, height, [((tick - low) / (high - low), f"{10**tick:.2g}") for tick in ticks], "x")
    parts += _axes(right, height, [(part / 4, _count(top * part / 4)) for part in range(5)], "y")
    return _svg(panel.title, height + 62, [*parts, *_names(panel.x_label, panel.y_label, right, height)])


def _count(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _axes(right: float, height: float, ticks: list[tuple[float, str]], side: str) -> list[str]:
    """Lines of the grid with their labels; a tick's place is a share of the axis."""
    parts = []
    for at, label in ticks:
        if side == "x":
            x = _LEFT + at * (right - _LEFT)
            parts.append(f'<path d="M{x:.1f} {_TOP + _LINE}V{_TOP + height}" class="grid"/>')
            parts.append(_text(x, _TOP + height + 13, label, "middle"))
        else:
            y = _TOP + _LINE + (1 - at) * (height - _LINE)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{right:.1f}" class="grid"/>')
            parts.append(_text(_LEFT - 7, y, label, "end"))
    return parts


def _names(x_label: str, y_label: str, right: float, height: float) -> list[str]:
    """The names of the axes: that of y lies above it."""
    return [
        _text((_LEFT + right) / 2, _TOP + height + 36, x_label, "middle", "name"),
        _text(4, _TOP + 2, y_label, "start", "name"),
    ]


def _shortened(text: str, width: float) -> str:
    """The end of a name that is too long for its place."""
    most = int(width / _CHARACTER)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _svg(title: str, height: float, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
