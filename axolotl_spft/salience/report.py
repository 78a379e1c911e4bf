"""What a mask looks like: counts and coverage, per matrix and per module type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from axolotl_spft.module_types import places_of
from axolotl_spft.ops.mask.coverage import Coverage, MatrixReport, coverage_of, report_matrix
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.tables import aligned


@dataclass(frozen=True)
class MaskReport:
    """Figures of a whole mask; ``str(report)`` is a table per module type.

    ``samples`` is how many examples the salience pass read; 0 where it needed none. ``notes`` are sentences about what
    the budget could not be spent on, ``untrained`` the names of the matrices that therefore got nothing.
    """

    matrices: tuple[MatrixReport, ...]
    source: str
    samples: int
    notes: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()

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
        table = aligned(("module", *Coverage.HEADER), rows)
        return "\n".join([f"Sparse mask: {self.source}", *table, *(f"Note: {note}" for note in self.notes)])


def report_masks(
    masks: Mapping[str, tuple[Mask, int]],
    source: str,
    samples: int,
    notes: Sequence[str] = (),
    untrained: Sequence[str] = (),
) -> MaskReport:
    """The report of ``masks``: name -> (mask, in_features)."""
    matrices = (report_matrix(name, mask, in_features) for name, (mask, in_features) in masks.items())
    return MaskReport(tuple(matrices), source, samples, tuple(notes), tuple(untrained))
