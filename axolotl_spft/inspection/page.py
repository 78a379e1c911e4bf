"""One HTML page that holds all it needs: tables, and the panels as SVG. It works without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from axolotl_spft.files import atomic_path
from axolotl_spft.inspection.inspect import Inspection
from axolotl_spft.inspection.panels import Section, sections
from axolotl_spft.inspection.svg import draw
from axolotl_spft.inspection.text import (
    COVERAGE_HEADER,
    NO_BASE,
    OVERLAP_HEADER,
    OVERLAP_TITLE,
    coverage_rows,
    groupings,
    only_in_one,
    overlap_groups,
    overlap_rows,
    value_header,
    value_rows,
)

# a longer table is folded
_LONG = 16


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page; it appears complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(inspection), encoding="utf-8")


def page(inspection: Inspection) -> str:
    """The page's HTML."""
    style = resources.files("axolotl_spft.inspection").joinpath("page.css").read_text(encoding="utf-8")
    names = " and ".join(file.path.name for file in inspection.files)
    parts = sections(inspection)
    tables = [_file_tables(inspection, number) for number in range(len(inspection.files))]
    if inspection.overlaps is not None:
        tables.append(_overlap_tables(inspection))
    body = "\n".join(_section(part, table) for part, table in zip(parts, tables))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(names)}: axolotl spft inspect</title>
<style>
{style}</style>
</head>
<body>
<h1>{escape(names)}</h1>
<p>Entries are the weights that are trained. A row or column is used when it holds an entry; the area is used rows
times used columns. Point at a cell or a bar for its number.</p>
{body}
</body>
</html>
"""


def _section(part: Section, tables: str) -> str:
    panels = "\n".join(f"<figure><h3>{escape(panel.title)}</h3>{draw(panel)}</figure>" for panel in part.panels)
    return f'<section>\n<h2>{escape(part.title)}</h2>\n<div class="panels">\n{panels}\n</div>\n{tables}\n</section>'


def _file_tables(inspection: Inspection, number: int) -> str:
    file, has_base = inspection.files[number], inspection.has_base
    tables = []
    for name, groups in groupings(inspection.figures[number]).items():
        tables.append(_table(f"Entries by {name}", (name, *COVERAGE_HEADER), coverage_rows(groups)))
        if file.kind == "adapter":
            tables.append(_table(f"Values by {name}", (name, *value_header(has_base)), value_rows(groups, has_base)))
    if file.kind == "adapter" and not has_base:
        tables.append(f"<p>{escape(NO_BASE)}</p>")
    return "\n".join(tables)


def _overlap_tables(inspection: Inspection) -> str:
    tables = [f"<p>{escape(OVERLAP_TITLE[0].upper() + OVERLAP_TITLE[1:])}.</p>"]
    for name, groups in overlap_groups(inspection).items():
        tables.append(_table(f"Overlap by {name}", (name, *OVERLAP_HEADER), overlap_rows(groups)))
    return "\n".join([*tables, *(f"<p>{escape(sentence)}</p>" for sentence in only_in_one(inspection))])


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        style = ' class="total"' if row[0] == "total" else ""
        lines.append(f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    folded = "" if len(rows) > _LONG else " open"
    return (
        f'<details{folded}>\n<summary>{escape(title)}</summary>\n<div class="table"><table>\n<thead><tr>{head}</tr>'
        f"</thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table></div>\n</details>"
    )
