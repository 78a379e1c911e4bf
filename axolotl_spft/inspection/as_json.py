"""The figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from axolotl_spft.inspection.inspect import Inspection
from axolotl_spft.inspection.overlap import Overlap, total
from axolotl_spft.inspection.statistics import QUANTILES, MatrixFigures, by_kind, by_layer, figures_of
from axolotl_spft.inspection.text import overlap_groups

SCHEMA_VERSION = 1


def figures_as_json(inspection: Inspection) -> dict[str, Any]:
    """What ``--json`` prints; shares are parts of 1, and what is not known is null."""
    files = [
        {
            "path": str(file.path),
            "kind": file.kind,
            "mask_source": dict(file.source),
            "total": _group(figures),
            "module_types": {name: _group(group) for name, group in by_kind(figures).items()},
            "layers": {name: _group(group) for name, group in by_layer(figures).items()},
            "matrices": {each.report.name: _matrix(each) for each in figures},
        }
        for file, figures in zip(inspection.files, inspection.figures)
    ]
    return {"schema_version": SCHEMA_VERSION, "files": files, "overlap": _overlap(inspection)}


def _group(group: Sequence[MatrixFigures]) -> dict[str, Any]:
    figures = figures_of(group)
    values = None
    if figures.values is not None:
        values = asdict(figures.values)
        values["quantiles"] = {f"{at:g}": value for at, value in zip(QUANTILES, figures.values.quantiles)}
    held = {"in_top_tenth_of_rows": figures.top_rows, "in_top_tenth_of_columns": figures.top_columns}
    return {**asdict(figures.coverage), **held, "values": values}


def _matrix(each: MatrixFigures) -> dict[str, Any]:
    shape: dict[str, Any] = {"layer": each.place.layer, "module_type": each.place.kind}
    shape |= {"out_features": each.report.out_features, "in_features": each.report.in_features}
    shape |= {"used_rows": each.report.used_rows, "used_columns": each.report.used_columns}
    return shape | _group([each])


def _overlap(inspection: Inspection) -> dict[str, Any] | None:
    if inspection.overlaps is None:
        return None
    groups = overlap_groups(inspection)
    return {
        "total": _told(total(inspection.overlaps.values())),
        "module_types": _all_told(groups["module"]),
        "layers": _all_told(groups["layer"]),
        "matrices": _all_told(inspection.overlaps),
    }


def _all_told(overlaps: Mapping[str, Overlap]) -> dict[str, Any]:
    return {name: _told(each) for name, each in overlaps.items()}


def _told(overlap: Overlap) -> dict[str, Any]:
    return {**asdict(overlap), "jaccard": overlap.jaccard}
