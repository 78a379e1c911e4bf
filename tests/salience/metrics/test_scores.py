"""The salience scores against their formulas."""

from __future__ import annotations

import torch

from axolotl_spft.salience.metrics import balanced, gradient, magnitude, random
from axolotl_spft.salience.metrics.statistics import Statistics


def test_gradient_and_magnitude_are_absolute_values_in_float32():
    matrix = torch.tensor([[1.0, -2.0], [0.0, -0.5]])
    assert torch.equal(gradient.score(Statistics((2, 2), collected={"gradient": matrix})), matrix.abs())
    score = magnitude.score(Statistics((2, 2), read_weight=lambda: matrix.to(torch.bfloat16)))
    assert score.dtype == torch.float32
    assert torch.equal(score, matrix.abs())


def test_balanced_divides_by_row_and_column_rms():
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    score = balanced.score(Statistics((5, 7), collected={"gradient": g}))
    wide = g.double()
    for i in range(5):
        for j in range(7):
            row_rms, column_rms = (wide[i] ** 2).mean().sqrt(), (wide[:, j] ** 2).mean().sqrt()
            expected = wide[i, j].abs() / (row_rms * column_rms).sqrt()
            assert abs(score[i, j].item() - expected.item()) < 1e-5


def test_balanced_is_finite_for_dead_rows_and_tiny_gradients():
    g = torch.zeros(4, 3)
    assert torch.equal(balanced.score(Statistics((4, 3), collected={"gradient": g})), g)
    g[1, 2] = 1e-30
    score = balanced.score(Statistics((4, 3), collected={"gradient": g}))
    assert torch.isfinite(score).all()
    assert (score[0] == 0).all()


def test_random_scores_depend_on_seed_and_layer_only():
    torch.manual_seed(5)
    one = random.score(Statistics((3, 4), seed=1, index=2))
    torch.manual_seed(6)
    assert torch.equal(one, random.score(Statistics((3, 4), seed=1, index=2)))
    assert not torch.equal(one, random.score(Statistics((3, 4), seed=2, index=2)))
    assert not torch.equal(one, random.score(Statistics((3, 4), seed=1, index=3)))
