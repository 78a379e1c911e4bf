"""Figures of matrices, against dense computations."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.inspection.overlap import overlap_of, total
from axolotl_spft.inspection.statistics import (
    GRID,
    QUANTILES,
    Matrix,
    by_kind,
    by_layer,
    figures_of,
    held_shares,
    measure,
    quantiles_of,
)
from axolotl_spft.ops.mask.csr import empty_mask, mask_from_positions
from tests.inspection.matrices import random_matrix


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(3)
    weights, matrices = {}, []
    for layer in range(3):
        for kind, shape, nnz in (("q_proj", (7, 11), 9), ("down_proj", (5, 23), 17)):
            name = f"model.layers.{layer}.{kind}"
            matrices.append(random_matrix(name, *shape, nnz, seed=len(matrices)))
            weights[name] = torch.randn(shape).to(torch.bfloat16)
    matrices.append(Matrix("lm_head", empty_mask(3, 4), 4, torch.empty(0)))
    weights["lm_head"] = torch.randn(3, 4)
    # a weight of 0 has no relative change
    first = matrices[0]
    weights[first.name][0, first.mask.columns[0].item()] = 0
    found = list(measure(matrices, list(weights), lambda matrix: weights[matrix.name]))
    return matrices, weights, found


def dense(matrix: Matrix) -> torch.Tensor:
    """S, with NaN where the mask holds nothing."""
    full = torch.full(matrix.shape, float("nan"))
    rows = torch.repeat_interleave(matrix.mask.row_offsets.diff().long())
    full[rows, matrix.mask.columns.long()] = matrix.values
    return full


def test_values_and_changes_equal_a_dense_computation(measured):
    matrices, weights, found = measured
    pairs = [(dense(matrix), weights[matrix.name].double()) for matrix in matrices]
    held = torch.cat([full[~full.isnan()] for full, _ in pairs]).abs()
    values = figures_of(found).values
    assert values.quantiles == pytest.approx(held.quantile(torch.tensor(QUANTILES)).tolist(), rel=1e-6)
    assert values.mean == pytest.approx(held.mean().item(), rel=1e-6)
    assert values.zeros == 0
    ratios = torch.cat([(full.double() / weight)[~full.isnan()] for full, weight in pairs]).abs()
    assert values.largest_change == pytest.approx(ratios[ratios.isfinite()].max().item())
    delta = sum(full.nan_to_num().double().square().sum() for full, _ in pairs)
    norm = sum(weight.square().sum() for _, weight in pairs)
    assert values.relative_norm == pytest.approx((delta / norm).sqrt().item())
    assert found[0].change.zeros == 1


def test_coverage_and_groups(measured):
    matrices, _, found = measured
    assert list(by_kind(found)) == ["q_proj", "down_proj", "lm_head"]
    assert list(by_layer(found)) == ["0", "1", "2", "-"]
    group = by_kind(found)["down_proj"]
    full = [~dense(matrix).isnan() for matrix in matrices if matrix.name.endswith("down_proj")]
    coverage = figures_of(group).coverage
    assert (coverage.matrices, coverage.selected, coverage.entries) == (3, 51, 345)
    assert coverage.rows == pytest.approx(sum(held.any(1).sum().item() for held in full) / 15)
    area = sum(held.any(1).sum().item() * held.any(0).sum().item() for held in full)
    assert coverage.area == pytest.approx(area / 345)
    nothing = figures_of(by_layer(found)["-"])
    assert (nothing.coverage.selected, nothing.top_rows, nothing.values) == (0, None, None)


def test_concentration_of_an_even_and_of_a_lone_row():
    assert held_shares(torch.full((7,), 4)).tolist() == pytest.approx(GRID)
    lone = held_shares(torch.tensor([0, 0, 12, 0]))
    # one of four rows holds all
    assert lone.tolist() == pytest.approx([min(1.0, 4 * share) for share in GRID])
    assert held_shares(torch.zeros(5, dtype=torch.int64)).tolist() == [0.0] * len(GRID)


def test_fullest_tenth_is_weighted_by_entries(measured):
    matrices, _, found = measured
    expected = 0.0
    for matrix in matrices[:-1]:
        counts = (~dense(matrix).isnan()).sum(0).sort(descending=True).values.tolist()
        at = 0.1 * len(counts)
        expected += sum(counts[: int(at)]) + (at % 1) * counts[int(at)]
    nnz = sum(matrix.mask.nnz for matrix in matrices)
    assert figures_of(found).top_columns == pytest.approx(expected / nnz)


def test_quantiles_of_one_value():
    assert quantiles_of(torch.tensor([0.25])) == (0.25,) * len(QUANTILES)


def test_overlap_equals_sets():
    one, other = random_matrix("a", 9, 13, 40, seed=1), random_matrix("a", 9, 13, 25, seed=2)
    sets = [set((~dense(matrix).isnan()).flatten().nonzero().squeeze(1).tolist()) for matrix in (one, other)]
    found = overlap_of(one, other)
    assert (found.first, found.second, found.shared) == (40, 25, len(sets[0] & sets[1]))
    assert found.jaccard == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert found.by_chance == pytest.approx(40 * 25 / (9 * 13))
    assert overlap_of(one, one).jaccard == 1
    both = total([found, overlap_of(one, one)])
    assert (both.shared, both.first) == (found.shared + 40, 80)


def test_wide_matrices_have_int32_columns():
    wide = mask_from_positions(torch.tensor([5, 70_001, 140_003]), 2, 70_002)
    found = overlap_of(Matrix("a", wide, 70_002), Matrix("a", wide, 70_002))
    assert found.shared == 3
