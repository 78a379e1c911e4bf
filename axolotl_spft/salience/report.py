"""What a mask looks like: counts and coverage, per matrix and per module type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from axolotl_spft.ops.mask.csr import Mask, used_columns, used_rows
from axolotl_spft.salience.module_types import places_of
from axolotl_spft.tables import aligned, percent


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
class Coverage:
    """Figures of several matrices together.

    Attributes:
        density: the share of their entries that is selected.
        rows, columns: the share of their rows, and of their columns, that hold a selected entry.
        area: used rows x used columns of each, as a share of their entries.
    """

    matrices: int
    selected: int
    entries: int
    density: float
    rows: float
    columns: float
    area: float

    HEADER: ClassVar = ("matrices", "selected", "share", "rows", "columns", "area")

    def cells(self) -> tuple[str, ...]:
        """A row of a table under ``HEADER``."""
        shares = (self.density, self.rows, self.columns, self.area)
        return (str(self.matrices), f"{self.selected:,}", *map(percent, shares))


def coverage_of(matrices: Iterable[MatrixReport]) -> Coverage:
    """The figures of ``matrices`` (at least one) together."""
    matrices = list(matrices)
    selected, entries = sum(m.selected for m in matrices), sum(m.entries for m in matrices)
    return Coverage(
        matrices=len(matrices),
        selected=selected,
        entries=entries,
        density=selected / entries,
        rows=sum(m.used_rows for m in matrices) / sum(m.out_features for m in matrices),
        columns=sum(m.used_columns for m in matrices) / sum(m.in_features for m in matrices),
        area=sum(m.used_rows * m.used_columns for m in matrices) / entries,
    )


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
        places = places_of(matrix.name for matrix in self.matrices)
        groups: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            groups.setdefault(places[matrix.name].kind, []).append(matrix)
        rows = [(name, *coverage_of(group).cells()) for name, group in groups.items()]
        if len(rows) > 1:
            rows.append(("total", *coverage_of(self.matrices).cells()))
        return "\n".join([f"Sparse mask: {self.source}", *aligned(("module", *Coverage.HEADER), rows)])


def report_matrix(name: str, mask: Mask, in_features: int) -> MatrixReport:
    """The figures of one matrix."""
    rows, columns = used_rows(mask).numel(), used_columns(mask, in_features).numel()
    return MatrixReport(name, mask.out_features, in_features, mask.nnz, rows, columns)


def report_masks(masks: Mapping[str, tuple[Mask, int]], source: str, samples: int) -> MaskReport:
    """The report of ``masks``: name -> (mask, in_features)."""
    matrices = (report_matrix(name, mask, in_features) for name, (mask, in_features) in masks.items())
    return MaskReport(tuple(matrices), source, samples)
