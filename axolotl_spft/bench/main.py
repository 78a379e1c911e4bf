"""Measures, prints, writes and draws: what the command `bench` does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from axolotl_spft.bench import plot, report
from axolotl_spft.bench.machine import machine
from axolotl_spft.bench.options import Options
from axolotl_spft.bench.rounds import compare
from axolotl_spft.bench.sweep import parse_values, sweep
from axolotl_spft.errors import SpftError
from axolotl_spft.files import check_writable


def run_comparison(options: Options, output: Path | None, picture: Path | None) -> None:
    """One comparison."""
    _get_ready(output, picture)
    rows, left_out = compare(options)
    print(report.comparison(rows))
    if output:
        report.write_json(output, report.results(options, machine(), rows, left_out))
    if picture:
        plot.plot_comparison(rows, picture, _title(options))


def run_sweep(options: Options, over: str, texts: Sequence[str], output: Path | None, picture: Path | None) -> None:
    """One comparison at each value of the option ``over``."""
    _get_ready(output, picture)
    points = []
    for point in sweep(options, over, parse_values(over, texts)):
        points.append(point)
        if output:
            # at each value: what was measured outlives a sweep that is broken off
            report.write_json(output, report.sweep_results(options, machine(), over, points))
    print(report.sweep_table(over, points))
    if picture:
        plot.plot_sweep(over, points, picture, _title(options, over))


def _get_ready(output: Path | None, picture: Path | None) -> None:
    """Find out before anything is measured what would lose the figures at the end."""
    if picture:
        plot.require_matplotlib()
        if picture.suffix not in plot.FORMATS:
            raise SpftError(f"`--plot {picture}` must end in {', '.join(plot.FORMATS)}")
    for path in filter(None, (output, picture)):
        check_writable(path)
    # random weights have no home on a hub, and SHiRA's delta is a sparse tensor
    for message in ("Could not find a config file", "Sparse invariant checks"):
        warnings.filterwarnings("ignore", message=message)


def _title(options: Options, over: str | None = None) -> str:
    what = machine()
    parts = [Path(options.model).name, options.dtype]
    parts += ["4-bit base"] if options.quantization == "4bit" else []
    parts += [] if over == "tokens" else [f"{options.tokens} tokens"]
    processor = what["cpu"] if options.device.startswith("cpu") else what["gpu"]
    return f"{', '.join(parts)}; {processor}, {what['date'][:10]}"
