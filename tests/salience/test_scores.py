"""The salience scores against their formulas."""

from __future__ import annotations

import torch

from axolotl_spft.salience.scores import balanced_score, gradient_score, magnitude_score, random_score


def test_gradient_and_magnitude_are_absolute_values_in_float32():
    matrix = torch.tensor([[1.0, -2.0], [0.0, -0.5]])
    assert torch.equal(gradient_score(matrix), matrix.abs())
    score = magnitude_score(matrix.to(torch.bfloat16))
    assert score.dtype == torch.float32
    assert torch.equal(score, matrix.abs())


def test_balanced_divides_by_row_and_column_rms():
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    score = balanced_score(gradient, 5)
    wide = gradient.double()
    for i in range(5):
        for j in range(7):
            row_rms, column_rms = (wide[i] ** 2).mean().sqrt(), (wide[:, j] ** 2).mean().sqrt()
            expected = wide[i, j].abs() / (row_rms * column_rms).sqrt()
            assert abs(score[i, j].item() - expected.item()) < 1e-5


def test_balanced_is_finite_for_dead_rows_and_tiny_gradients():
    gradient = torch.zeros(4, 3)
    assert torch.equal(balanced_score(gradient, 4), gradient)
    gradient[1, 2] = 1e-30
    score = balanced_score(gradient, 4)
    assert torch.isfinite(score).all()
    assert (score[0] == 0).all()


def test_random_scores_depend_on_seed_and_layer_only():
    torch.manual_seed(5)
    one = random_score((3, 4), seed=1, layer_index=2)
    torch.manual_seed(6)
    assert torch.equal(one, random_score((3, 4), seed=1, layer_index=2))
    assert not torch.equal(one, random_score((3, 4), seed=2, layer_index=2))
    assert not torch.equal(one, random_score((3, 4), seed=1, layer_index=3))
