"""How many values each matrix gets."""

from __future__ import annotations

import pytest

from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.errors import SpftConfigError

SHAPES = [(7, 5), (3, 11), (1, 1), (20, 20)]
ENTRIES = 35 + 33 + 1 + 400


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.1, 0.5, 1.0])
def test_density_is_rounded_to_at_least_one_value(density):
    expected = max(1, round(density * ENTRIES))
    assert total_budget(SHAPES, density=density) == expected
    assert sum(layer_budgets(SHAPES, density=density)) == expected


@pytest.mark.parametrize("num_values", [1, 2, 17, 468, 469])
def test_counts_follow_the_sizes_and_add_up(num_values):
    counts = layer_budgets(SHAPES, num_values=num_values)
    assert sum(counts) == num_values
    for (rows, columns), count in zip(SHAPES, counts):
        assert abs(count - num_values * rows * columns / ENTRIES) < 1
        assert count <= rows * columns


def test_remainders_go_to_the_largest_fractions_then_to_the_first():
    assert layer_budgets([(1, 3), (1, 3), (1, 4)], num_values=2) == [1, 0, 1]
    assert layer_budgets([(1, 2), (1, 2)], num_values=1) == [1, 0]


def test_lora_rank_gives_each_matrix_what_its_lora_would_train():
    assert layer_budgets([(20, 30), (30, 40)], match_lora_rank=2) == [100, 140]
    assert total_budget([(20, 30), (30, 40)], match_lora_rank=2) == 240


def test_lora_rank_too_large_for_one_small_matrix_is_spread_over_all():
    counts = layer_budgets([(2, 2), (30, 40)], match_lora_rank=2)
    assert sum(counts) == 2 * 4 + 2 * 70
    assert counts[0] <= 4


@pytest.mark.parametrize("options", [{"num_values": 470}, {"match_lora_rank": 9}])
def test_more_values_than_entries_is_refused(options):
    (key,) = options
    with pytest.raises(SpftConfigError, match=f"`{key}: {options[key]}` asks for .* have 469 entries"):
        layer_budgets(SHAPES, **options)
