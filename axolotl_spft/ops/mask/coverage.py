"""How many entries a mask holds, and how many rows and columns they are spread over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from axolotl_spft.ops.mask.csr import Mask, used_columns, used_rows
from axolotl_spft.tables import percent


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


def report_matrix(name: str, mask: Mask, in_features: int) -> MatrixReport:
    """The figures of one matrix."""
    rows, columns = used_rows(mask).numel(), used_columns(mask, in_features).numel()
    return MatrixReport(name, mask.out_features, in_features, mask.nnz, rows, columns)
