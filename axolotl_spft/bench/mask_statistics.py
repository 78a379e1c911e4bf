"""How concentrated real masks are: the shares of rows and columns that they use, recorded from a trained model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from axolotl_spft.errors import SpftFileError


class Shares(NamedTuple):
    """The share of a matrix' rows and of its columns that hold an entry.

    Attributes:
        rows, columns: of the matrix.
        union: of its columns that this matrix or another one that reads the same input uses.
    """

    rows: float
    columns: float
    union: float


_KEYS = ("row_share", "column_share", "union_share")


class MaskStatistics:
    """Recorded shares by salience and scope, module type and density.

    Args:
        recorded: "<salience>/<scope>" -> module type -> list of {density, row_share, column_share, union_share, area},
            densities ascending.
    """

    def __init__(self, recorded: Mapping[str, Mapping[str, list[dict[str, float]]]], source: str = "the statistics"):
        self.recorded, self.source = recorded, source

    @classmethod
    def read(cls, path: str | Path) -> MaskStatistics:
        """Read what `integration/bench/record_mask_statistics.py` wrote.

        Raises:
            SpftFileError: there is no such file, or it is another kind of file.
        """
        remedy = "name it with `--mask-statistics PATH`, compute masks with `--mask gradient`, or set `--area`"
        try:
            recorded = json.loads(Path(path).read_text(encoding="utf-8"))["statistics"]
            for kinds in recorded.values():
                for points in kinds.values():
                    _at(points, 1.0)
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise SpftFileError(
                f"{path}: no readable mask statistics ({type(error).__name__}: {error}), which `--mask drawn` needs. "
                f"They are part of the repository (integration/bench/mask_statistics.json): {remedy}"
            ) from error
        return cls(recorded, str(path))

    def shares(self, salience: str, scope: str, module: str, density: float) -> Shares:
        """Interpolated over the logarithm of the density, and the mean over module types for an unknown one.

        Outside the recorded densities the nearest holds, but at least as much as the density needs.

        Raises:
            SpftFileError: this salience and scope was not recorded.
        """
        kinds = self.recorded.get(f"{salience}/{scope}")
        if not kinds:
            raise SpftFileError(
                f"{self.source} has no masks of {salience}/{scope}, only {', '.join(self.recorded)}: "
                "record them, or leave this method out"
            )
        each = [_at(points, density) for points in ([kinds[module]] if module in kinds else kinds.values())]
        rows, columns, union = (sum(column) / len(each) for column in zip(*each))
        # half of the places filled is as dense as a drawn mask gets
        stretch = max(1.0, math.sqrt(2 * density / (rows * columns)))
        rows, columns = min(1.0, rows * stretch), min(1.0, columns * stretch)
        stretch = max(1.0, min(1.0, 2 * density) / (rows * columns))
        return Shares(min(1.0, rows * stretch), min(1.0, columns * stretch), union)


def shares_of_area(area: float) -> Shares:
    """Equal shares of rows and columns that cover this share of a matrix, chosen for each matrix by itself."""
    return Shares(math.sqrt(area), math.sqrt(area), 1.0)


def _at(points: list[dict[str, float]], density: float) -> Shares:
    low = max((p for p in points if p["density"] <= density), key=lambda p: p["density"], default=points[0])
    high = min((p for p in points if p["density"] >= density), key=lambda p: p["density"], default=points[-1])
    if low["density"] >= high["density"]:
        return Shares(*(high[key] for key in _KEYS))
    part = math.log(density / low["density"]) / math.log(high["density"] / low["density"])
    return Shares(*(low[key] + part * (high[key] - low[key]) for key in _KEYS))
