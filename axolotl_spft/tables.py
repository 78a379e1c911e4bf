"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [header, *rows]
    ]


def percent(share: float) -> str:
    """A share in percent, with two decimals, or two significant digits where it is small."""
    return f"{100 * share:.2f}%" if share == 0 or share >= 1e-3 else f"{100 * share:.2g}%"
