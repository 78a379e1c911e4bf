"""What a mask looks like: counts and coverage, per matrix and per module type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from axolotl_spft.module_types import places_of
from axolotl_spft.ops.mask.coverage import Coverage, MatrixReport, coverage_of, report_matrix
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.salience.repair import MatrixError
from axolotl_spft.tables import aligned, percent


@dataclass(frozen=True)
class MaskReport:
    """Figures of a whole mask; ``str(report)`` is a table per module type.

    ``samples`` is how many examples the salience pass read; 0 where it needed none. ``notes`` are sentences about what
    the budget could not be spent on, ``untrained`` the names of the matrices that therefore got nothing. ``errors`` are
    those of quantized matrices that are repaired, by name; ``weighted`` says whether the inputs' columns weight them.
    """

    matrices: tuple[MatrixReport, ...]
    source: str
    samples: int
    notes: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    errors: Mapping[str, MatrixError] = field(default_factory=dict)
    weighted: bool = True

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
        notes = [f"Note: {note}" for note in self.notes]
        return "\n".join([f"Sparse mask: {self.source}", *table, *self._error_lines(), *notes])

    def _error_lines(self) -> list[str]:
        if not self.errors:
            return []
        places = places_of(self.errors)
        groups: dict[str, list[MatrixError]] = {}
        for name, error in self.errors.items():
            groups.setdefault(places[name].kind, []).append(error)
        if len(groups) > 1:
            groups["total"] = list(self.errors.values())
        rows = [(name, *map(percent, relative_errors(group))) for name, group in groups.items()]
        what = (
            "||(W - Q) X|| / ||W X|| with the second moment of each input column"
            if self.weighted
            else "||W - Q|| / ||W||, for want of inputs"
        )
        return [f"Quantization error: {what}", *aligned(("module", "before", "repaired"), rows)]


def report_masks(
    masks: Mapping[str, tuple[Mask, int]],
    source: str,
    samples: int,
    notes: Sequence[str] = (),
    untrained: Sequence[str] = (),
    errors: Mapping[str, MatrixError] | None = None,
    weighted: bool = True,
) -> MaskReport:
    """The report of ``masks``: name -> (mask, in_features)."""
    matrices = (report_matrix(name, mask, in_features) for name, (mask, in_features) in masks.items())
    return MaskReport(tuple(matrices), source, samples, tuple(notes), tuple(untrained), dict(errors or {}), weighted)


def relative_errors(errors: Sequence[MatrixError]) -> tuple[float, float]:
    """||(W - Q) X|| / ||W X|| over some matrices, before and after repair."""
    whole = sum(error.whole for error in errors) or 1.0
    return tuple((sum(squares) / whole) ** 0.5 for squares in zip(*((e.before, e.after) for e in errors)))
