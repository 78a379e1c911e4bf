"""The figures as tables of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from axolotl_spft.inspection.inspect import Inspection
from axolotl_spft.inspection.overlap import Overlap, total
from axolotl_spft.inspection.statistics import (
    QUANTILES,
    Figures,
    MatrixFigures,
    ValueFigures,
    by_kind,
    by_layer,
    figures_of,
)
from axolotl_spft.ops.mask.coverage import Coverage
from axolotl_spft.tables import aligned, percent

NO_BASE = "Relative changes are not told: they need the base model's weights (--base FOLDER)."
COVERAGE_HEADER = (*Coverage.HEADER, "in 10% of rows", "of columns")
VALUE_HEADER = ("mean |s|", "median", "99%", "largest", "zeros")
BASE_HEADER = ("largest |s/w|", "norm S / norm W")
OVERLAP_TITLE = "entries that both masks hold, beside what two random masks of these sizes would share"
OVERLAP_HEADER = ("first", "second", "shared", "by chance", "Jaccard")


def describe(inspection: Inspection) -> str:
    """All tables: of each file by module type and by layer, and of the overlap."""
    parts = []
    for file, figures in zip(inspection.files, inspection.figures):
        parts.append(file.title)
        for name, groups in groupings(figures).items():
            parts += ["", *aligned((name, *COVERAGE_HEADER), coverage_rows(groups))]
        if file.kind == "adapter":
            columns = value_header(inspection.has_base)
            for name, groups in groupings(figures).items():
                parts += ["", *aligned((name, *columns), value_rows(groups, inspection.has_base))]
            parts += [] if inspection.has_base else ["", NO_BASE]
        parts.append("")
    if inspection.overlaps is not None:
        parts.append(OVERLAP_TITLE)
        for name, overlaps in overlap_groups(inspection).items():
            parts += ["", *aligned((name, *OVERLAP_HEADER), overlap_rows(overlaps))]
        parts += only_in_one(inspection)
    return "\n".join(parts).rstrip()


def groupings(figures: Sequence[MatrixFigures]) -> dict[str, dict[str, list[MatrixFigures]]]:
    """The matrices by module type and by layer."""
    return {"module": by_kind(figures), "layer": by_layer(figures)}


def coverage_rows(groups: Mapping[str, Sequence[MatrixFigures]]) -> list[tuple[str, ...]]:
    """A row under `COVERAGE_HEADER` for each group and, where there are several, one for all."""
    return [
        (name, *each.coverage.cells(), _or_dash(each.top_rows, percent), _or_dash(each.top_columns, percent))
        for name, each in _with_total(groups).items()
    ]


def value_header(has_base: bool) -> tuple[str, ...]:
    """The columns of the table of values, after the group's name."""
    return (*VALUE_HEADER, *BASE_HEADER) if has_base else VALUE_HEADER


def value_rows(groups: Mapping[str, Sequence[MatrixFigures]], has_base: bool) -> list[tuple[str, ...]]:
    """A row under `value_header` for each group and, where there are several, one for all."""
    return [(name, *_value_cells(each.values, has_base)) for name, each in _with_total(groups).items()]


def _with_total(groups: Mapping[str, Sequence[MatrixFigures]]) -> dict[str, Figures]:
    named = dict(groups)
    if len(named) > 1:
        named["total"] = [each for group in groups.values() for each in group]
    return {name: figures_of(group) for name, group in named.items()}


def _value_cells(values: ValueFigures | None, has_base: bool) -> tuple[str, ...]:
    if values is None:
        return ("-",) * len(value_header(has_base))
    told = [values.mean, *(values.quantiles[QUANTILES.index(at)] for at in (0.5, 0.99, 1.0))]
    cells = (*map(number, told), f"{values.zeros:,}")
    changes = (_or_dash(values.largest_change, number), _or_dash(values.relative_norm, percent))
    return (*cells, *changes) if has_base else cells


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def overlap_groups(inspection: Inspection) -> dict[str, dict[str, Overlap]]:
    """The overlaps summed by module type and by layer: "module" and "layer" -> group -> overlap."""
    found = {}
    for name, groups in groupings(inspection.figures[0]).items():
        names = {label: [each.report.name for each in group] for label, group in groups.items()}
        shared = {label: [n for n in group if n in inspection.overlaps] for label, group in names.items()}
        found[name] = {label: total(inspection.overlaps[n] for n in group) for label, group in shared.items() if group}
    return found


def overlap_rows(groups: Mapping[str, Overlap]) -> list[tuple[str, ...]]:
    """A row for each group and, where there are several, one for all."""
    named = {**groups, "total": total(groups.values())} if len(groups) > 1 else groups
    return [
        (
            name, f"{each.first:,}", f"{each.second:,}", f"{each.shared:,}", f"{each.by_chance:,.1f}",
            f"{each.jaccard:.4f}",
        )
        for name, each in named.items()
    ]  # fmt: skip


def only_in_one(inspection: Inspection) -> list[str]:
    """Sentences about matrices that one of the two files alone holds."""
    one, other = (file.matrices for file in inspection.files)
    sentences = []
    for ordinal, mine, yours in (("first", one, other), ("second", other, one)):
        alone = [name for name in mine if name not in yours]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            sentences.append(f"Only the {ordinal} holds {alone[0]}{more}; the overlap leaves them out.")
    return sentences
