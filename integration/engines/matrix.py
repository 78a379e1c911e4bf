"""Every engine x base x {fresh, killed and resumed} on CPU ranks, against one process: one table, one verdict each.

    python -m integration.engines.matrix [--output figures.json] [--keep FOLDER]

A fresh run must give the losses, the values and the mask of one process with the same global batch. A killed run gets
SIGKILL on all ranks at once, is started again with the same command, and must end in the state of the fresh run, bit
for bit. The command fails when a verdict is not ``ok``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from axolotl_spft.bench.machine import machine
from integration.engines.cases import BASES, ENGINES, RANKS, STEPS, write_case
from integration.engines.figures import Figures, figures_of, relative_difference, same_state
from integration.engines.run import TrainingFailed, train
from integration.engines.workspace import make_workspace

MAX_DIFFERENCE = 1e-5
# one after the other over the cells, so that each moment meets several engines
_DEATHS = ("checkpoint:2", "step:4", "salience:2")


def run_cell(folder: Path, engine: str, base: str, reference: Figures, dies_at: str) -> list[dict[str, Any]]:
    """The rows of one engine and base: fresh, then killed and resumed."""
    nnz = reference.values.numel()
    fresh, killed = (f"{engine}-{base}{ending}" for ending in ("", "-killed"))
    rows = []
    try:
        train(write_case(folder, fresh, engine, **BASES[base]), RANKS)
        figures = figures_of(folder / fresh, STEPS)
        problems = problems_of(figures, reference)
        rows.append(row(engine, base, "fresh", figures, nnz, problems))
    except TrainingFailed as failure:
        return [failed(engine, base, "fresh", failure), failed(engine, base, f"killed at {dies_at}", "no fresh run")]
    try:
        config = write_case(folder, killed, engine, **BASES[base])
        train(config, RANKS, dies_at=dies_at)
        train(config, RANKS)
        figures = figures_of(folder / killed, STEPS)
        last = f"checkpoint-{STEPS}"
        problems = [] if same_state(folder / fresh / last, folder / killed / last) else ["not the fresh run's state"]
        rows.append(row(engine, base, f"killed at {dies_at}", figures, nnz, problems))
    except TrainingFailed as failure:
        rows.append(failed(engine, base, f"killed at {dies_at}", failure))
    return rows


def problems_of(figures: Figures, reference: Figures) -> list[str]:
    """What differs from the run of one process beyond `MAX_DIFFERENCE`."""
    problems = []
    if figures.mask != reference.mask:
        problems.append("another mask")
    elif relative_difference(figures.values, reference.values) > MAX_DIFFERENCE:
        problems.append(f"values differ by {relative_difference(figures.values, reference.values):.1e}")
    worst = max(abs(one - other) / other for one, other in zip(figures.losses, reference.losses, strict=True))
    if worst > MAX_DIFFERENCE:
        problems.append(f"losses differ by {worst:.1e}")
    return problems


def row(engine: str, base: str, run: str, figures: Figures, nnz: int, problems: list[str]) -> dict[str, Any]:
    return {
        "engine": engine,
        "base": base,
        "run": run,
        "first_loss": figures.losses[0],
        "last_loss": figures.losses[-1],
        "mask": figures.mask[:12],
        "moment_bytes_per_value": figures.moment_bytes / nnz,
        "master_bytes_per_value": figures.master_bytes / nnz,
        "verdict": "; ".join(problems) or "ok",
    }


def failed(engine: str, base: str, run: str, failure: object) -> dict[str, Any]:
    print(failure, file=sys.stderr)
    return {"engine": engine, "base": base, "run": run, "verdict": "failed"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under a header; bytes are those of the whole run's checkpoint, divided by nnz."""
    names = {
        "engine": "engine", "base": "base", "run": "run", "first_loss": "first loss", "last_loss": "last loss",
        "mask": "mask", "moment_bytes_per_value": "moments B/value", "master_bytes_per_value": "master B/value",
        "verdict": "verdict",
    }  # fmt: skip

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [list(names.values()), *([cell(each.get(name, "-")) for name in names] for each in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def run_matrix(folder: Path) -> list[dict[str, Any]]:
    """All rows, with the run of one process before those of each base."""
    make_workspace(folder)
    rows = []
    deaths = 0
    with tqdm(total=len(BASES) * (1 + 3 * len(ENGINES)), desc="Engines", unit="run") as bar:
        for base, keys in BASES.items():
            name = f"single-{base}"
            train(write_case(folder, name, "single", ranks=1, **keys), 1)
            reference = figures_of(folder / name, STEPS)
            rows.append(row("single", base, "fresh", reference, reference.values.numel(), []))
            bar.update()
            for engine in ENGINES:
                rows += run_cell(folder, engine, base, reference, _DEATHS[deaths % len(_DEATHS)])
                deaths += 1
                bar.update(3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    parser.add_argument("--keep", type=Path, help="run in this new folder and leave everything there")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True)
        rows = run_matrix(options.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = run_matrix(Path(folder))
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    if any(each["verdict"] != "ok" for each in rows):
        raise SystemExit("not every verdict is ok")


if __name__ == "__main__":
    main()
