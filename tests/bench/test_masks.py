"""Drawn masks have the properties that they are asked for."""

from __future__ import annotations

import math

import pytest
import torch

from axolotl_spft.bench.masks import draw_mask, pool_share
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import positions, problems_of, used_columns, used_rows


def draw(*args, seed: int = 0):
    return draw_mask(*args, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "out_features, in_features, nnz, row_share, column_share",
    [(50, 70, 200, 0.3, 0.5), (70, 50, 40, 1.0, 0.1), (33, 9, 33 * 9, 1.0, 1.0), (20, 20, 1, 0.05, 0.05),
     (40, 40, 36, 0.15, 0.15), (64, 300, 64, 1.0, 0.2)],
)  # fmt: skip
def test_every_used_row_and_column_holds_an_entry_and_none_is_drawn_twice(
    out_features, in_features, nnz, row_share, column_share
):
    mask = draw(out_features, in_features, nnz, row_share, column_share)
    assert problems_of(mask, torch.zeros(nnz), out_features, in_features) == []
    assert mask.nnz == nnz
    assert used_rows(mask).numel() == min(nnz, round(row_share * out_features))
    assert used_columns(mask, in_features).numel() == min(nnz, round(column_share * in_features))


def test_some_rows_and_columns_hold_many_more_entries_than_others():
    mask = draw(200, 300, 3000, 0.5, 0.5)
    counts = mask.row_offsets.diff()
    assert counts.max() > 3 * counts[counts > 0].float().median()


def test_the_generator_alone_decides():
    first, again, other = (draw(50, 70, 200, 0.3, 0.5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(positions(first, 70), positions(again, 70))
    assert not torch.equal(positions(first, 70), positions(other, 70))


def test_more_entries_than_places_are_refused():
    with pytest.raises(SpftError, match="30 entries do not fit on 5 rows x 5 columns of a 50 x 50"):
        draw(50, 50, 30, 0.1, 0.1)


def test_only_the_given_columns_are_used():
    among = torch.tensor([3, 5, 8, 13, 21, 34])
    mask = draw_mask(40, 50, 30, 0.5, 0.1, torch.Generator().manual_seed(0), among)
    used = used_columns(mask, 50)
    assert used.numel() == 5 and torch.isin(used, among).all()


@pytest.mark.parametrize("column_shares", [(0.3, 0.5, 0.2), (0.4, 0.4), (0.25,)])
def test_layers_that_choose_from_a_pool_use_as_many_columns_together_as_asked_for(column_shares):
    width, alone = 20_000, 1 - math.prod(1 - share for share in column_shares)
    for union in torch.linspace(max(column_shares), alone, 5).tolist():
        pool = int(pool_share(column_shares, union) * width)
        used = torch.cat([torch.randperm(pool)[: int(share * width)] for share in column_shares]).unique()
        assert used.numel() / width == pytest.approx(union, abs=0.01)


@pytest.mark.parametrize("union, pool", [(0.0, 0.5), (0.5, 0.5), (0.8, 1.0), (1.0, 1.0)])
def test_a_union_that_cannot_be_gives_the_nearer_end(union, pool):
    assert pool_share((0.5, 0.4), union) == pytest.approx(pool)
