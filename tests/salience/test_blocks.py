"""Selection of whole blocks, against a plain loop over them in float64."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.blocks import block_entries, block_scores, is_of_blocks, top_blocks

CASES = [((7, 13), (2, 3)), ((7, 13), (1, 4)), ((5, 5), (64, 64)), ((8, 6), (4, 2)), ((3, 10), (5, 1))]


def blocks_of(matrix: torch.Tensor, block: tuple[int, int]) -> list[tuple[float, list[int]]]:
    """The sum and the positions of each block."""
    at = torch.arange(matrix.numel()).view(matrix.shape)
    return [
        (rows.double().sum().item(), places.flatten().tolist())
        for band, place in zip(matrix.split(block[0]), at.split(block[0]))
        for rows, places in zip(band.split(block[1], 1), place.split(block[1], 1))
    ]


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_blocks_are_those_of_a_full_sort(shape, block, kind):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if kind == "ties" else scores
    found = blocks_of(scores, block)
    sums = block_scores(scores, shape, block)
    torch.testing.assert_close(sums.flatten().double(), torch.tensor([total for total, _ in found]).double())
    assert block_entries(shape, block).flatten().tolist() == [len(places) for _, places in found]
    order = sorted(range(len(found)), key=lambda i: -sums.flatten()[i].item())
    for k in range(0, scores.numel() + 1, 5):
        expected: list[int] = []
        for number in order:
            if len(expected) + len(found[number][1]) > k:
                break
            expected += found[number][1]
        got = top_blocks(sums, shape, block, k)
        assert got.tolist() == sorted(expected)
        assert is_of_blocks(mask_from_positions(got, *shape), shape, block)
    assert top_blocks(sums, shape, block, scores.numel()).numel() == scores.numel()


def test_a_mask_with_part_of_a_block_is_not_of_blocks():
    assert not is_of_blocks(mask_from_positions(torch.tensor([0, 1, 13]), 7, 13), (7, 13), (2, 2))
    assert is_of_blocks(mask_from_positions(torch.tensor([12, 25]), 7, 13), (7, 13), (2, 2))
