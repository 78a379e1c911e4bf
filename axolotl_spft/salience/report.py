"""What a mask looks like: counts and coverage, per matrix and per module type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from axolotl_spft.ops.mask.csr import Mask, used_columns, used_rows


@dataclass(frozen=True)
class MatrixReport:
    """Figures of one matrix: its shape, how many entries are selected, and the rows and columns that hold one."""

    name: str
    out_features: int
    in_features: int
    selected: int
    used_rows: int
    used_columns: int

    @property
    def entries(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class MaskReport:
    """Figures of a whole mask; ``str(report)`` is a table per module type.

    ``samples`` is how many examples the salience pass read; 0 where it needed none.
    """

    matrices: tuple[MatrixReport, ...]
    source: str
    samples: int

    @property
    def selected(self) -> int:
        return sum(matrix.selected for matrix in self.matrices)

    @property
    def entries(self) -> int:
        return sum(matrix.entries for matrix in self.matrices)

    def __str__(self) -> str:
        groups: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            groups.setdefault(matrix.name.rpartition(".")[2], []).append(matrix)
        header = ("module", "matrices", "selected", "share", "rows", "columns", "area")
        rows = [_row(name, group) for name, group in groups.items()]
        if len(rows) > 1:
            rows.append(_row("total", list(self.matrices)))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                      enumerate(zip(row, widths)))
            for row in [header, *rows]
        ]  # fmt: skip
        return "\n".join([f"Sparse mask: {self.source}", *lines])


def _row(name: str, group: list[MatrixReport]) -> tuple[str, ...]:
    def share(part: float, whole: float) -> str:
        return f"{100 * part / whole:.2f}%"

    return (
        name,
        str(len(group)),
        f"{sum(m.selected for m in group):,}",
        share(sum(m.selected for m in group), sum(m.entries for m in group)),
        share(sum(m.used_rows for m in group), sum(m.out_features for m in group)),
        share(sum(m.used_columns for m in group), sum(m.in_features for m in group)),
        share(sum(m.used_rows * m.used_columns for m in group), sum(m.entries for m in group)),
    )


def report_masks(masks: Mapping[str, tuple[Mask, int]], source: str, samples: int) -> MaskReport:
    """The report of ``masks``: name -> (mask, in_features)."""
    return MaskReport(
        tuple(
            MatrixReport(
                name, mask.out_features, in_features, mask.nnz,
                used_rows(mask).numel(), used_columns(mask, in_features).numel(),
            )
            for name, (mask, in_features) in masks.items()
        ),
        source,
        samples,
    )  # fmt: skip
