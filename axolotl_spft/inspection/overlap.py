"""How much two masks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.inspection.statistics import Matrix
from axolotl_spft.ops.mask.csr import positions


@dataclass(frozen=True)
class Overlap:
    """Entries of two masks of one matrix, or sums over several.

    Attributes:
        first, second: entries of each.
        shared: entries that both hold.
        by_chance: entries that two random masks of these sizes would share on average.
    """

    first: int
    second: int
    shared: int
    by_chance: float

    @property
    def jaccard(self) -> float:
        """|A and B| / |A or B|; 1 for two empty masks."""
        union = self.first + self.second - self.shared
        return self.shared / union if union else 1.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.first + other.first,
            self.second + other.second,
            self.shared + other.shared,
            self.by_chance + other.by_chance,
        )


NOTHING = Overlap(0, 0, 0, 0.0)


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """The sums over several matrices."""
    return sum(overlaps, NOTHING)


def overlap_of(first: Matrix, second: Matrix) -> Overlap:
    """The overlap of two masks of one matrix."""
    both = torch.cat([positions(matrix.mask, matrix.in_features) for matrix in (first, second)]).sort().values
    shared = int((both[1:] == both[:-1]).sum())
    one, other = first.mask.nnz, second.mask.nnz
    return Overlap(one, other, shared, one * other / (first.shape[0] * first.shape[1]))


def check_same_model(first: Mapping[str, Matrix], second: Mapping[str, Matrix], names: tuple[str, str]) -> None:
    """Check that two files have matrices in common, and these the same shapes.

    Raises:
        SpftFileError: they have not.
    """
    common = [name for name in first if name in second]
    differ = [
        f"{name} is {first[name].shape} and {second[name].shape}"
        for name in common
        if first[name].shape != second[name].shape
    ]
    if not common:
        differ = [f"the first holds {next(iter(first))}, the second {next(iter(second))}, and no matrix is in both"]
    if differ:
        raise SpftFileError(
            f"{names[0]} and {names[1]} belong to different models: {first_of(differ, '; ')}. "
            "Compare files of one model"
        )
