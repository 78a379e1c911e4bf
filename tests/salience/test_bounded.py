"""A global top-k with bounds, against one that takes entry after entry."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.salience import select
from axolotl_spft.salience.bounded import bounded_counts
from tests.salience.test_select import KINDS, score_matrices


def taken_one_by_one(scores: list[torch.Tensor], fewest: list[int], most: list[int], k: int) -> list[int]:
    """The oracle: each matrix' fewest first, then the highest anywhere that its matrix may still have."""
    counts = list(fewest)
    rest = []
    for index, matrix in enumerate(scores):
        ordered = matrix.double().flatten().sort(descending=True, stable=True).values.tolist()
        rest += [(-score, index) for score in ordered[fewest[index] :]]
    for _, index in sorted(rest, key=lambda entry: entry[0]):
        if sum(counts) < k and counts[index] < most[index]:
            counts[index] += 1
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fewest", "most", "k"),
    [
        ([0, 0, 0, 0], [91, 1, 87, 155], 50),
        ([5, 0, 20, 3], [40, 1, 25, 155], 60),
        ([5, 0, 20, 3], [40, 1, 25, 155], 28),
        ([5, 0, 20, 3], [9, 0, 25, 4], 38),
        # a matrix that gets nothing, and one whose count is its own
        ([0, 0, 17, 0], [91, 0, 17, 155], 90),
    ],
)
def test_the_counts_are_those_of_taking_one_by_one(monkeypatch, kind, fewest, most, k):
    monkeypatch.setattr(select, "CHUNK_ENTRIES", 16)
    scores = score_matrices(kind)
    counts = bounded_counts(scores.__getitem__, fewest, most, k)
    assert counts == taken_one_by_one(scores, fewest, most, k)
    assert sum(counts) == k


def test_scores_that_stand_for_several_entries():
    scores = [torch.tensor([[3.0, -1.0], [2.0, 2.0]]), torch.tensor([[2.5]])]
    weights = [torch.tensor([[4, 4], [2, 3]]), torch.tensor([[5]])]
    # 3.0, 2.5, then of the two at 2.0 what is left
    assert bounded_counts(scores.__getitem__, [0, 0], [13, 5], 12, weight_of=weights.__getitem__) == [7, 5]
