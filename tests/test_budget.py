"""How many values each matrix gets."""

from __future__ import annotations

import pytest

from axolotl_spft.budget import layer_budgets, missing_allowed, share_bounds, total_budget
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


NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.down_proj"]


@pytest.mark.parametrize("budget", [{"density": 0.07}, {"num_values": 40}, {"match_lora_rank": 1}], ids=str)
def test_a_pattern_sets_the_density_of_the_matrices_it_names(budget):
    pattern = {"q_proj": 0.5}
    counts = layer_budgets(SHAPES, **budget, density_pattern=pattern, names=NAMES)
    total = total_budget(SHAPES, **budget, density_pattern=pattern, names=NAMES)
    # 35 + 1 entries under the key, 33 + 400 others
    assert counts[0] + counts[2] == 18
    others = {"density": round(0.07 * 433), "num_values": 40 - 18, "match_lora_rank": (3 + 11) + (20 + 20)}
    assert sum(counts) == total == 18 + others[next(iter(budget))]
    assert layer_budgets(SHAPES, **budget, density_pattern={}, names=NAMES) == layer_budgets(SHAPES, **budget)


@pytest.mark.parametrize(
    ("pattern", "of_first"),
    [
        # the first key that matches, the ending of a name, a part of it never
        ({"layers.0.q_proj": 0.2, "q_proj": 1.0}, 7),
        ({"q_proj": 1.0, r"layers\.\d+\.down_proj": 0.1}, 35),
        ({r".*\.[kq]_proj": 0.6}, 21),
    ],
)
def test_a_pattern_matches_as_pefts_rank_pattern(pattern, of_first):
    counts = layer_budgets(SHAPES, density=0.01, density_pattern=pattern, names=NAMES)
    assert counts[0] == of_first


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"density": 0.1, "density_pattern": {"v_proj": 0.2}}, "`v_proj`, which match no targeted module"),
        ({"density": 0.1, "density_pattern": {"proj": 0.2}}, "`proj`, which match no targeted module"),
        ({"density": 0.1, "density_pattern": {"q_proj": 0.2, "0.q_proj": 0.3}}, "`0.q_proj`, which match no"),
        ({"num_values": 10, "density_pattern": {"q_proj": 0.5}}, "`num_values: 10` asks for 10 values, 18 of them"),
    ],
)
def test_patterns_that_cannot_be_kept_are_refused(options, part):
    with pytest.raises(SpftConfigError, match=part):
        total_budget(SHAPES, names=NAMES, **options)


@pytest.mark.parametrize("pattern", [{}, {"q_proj": 0.5}, {".*_proj": 0.05}], ids=str)
@pytest.mark.parametrize("dead", [(1,), (0, 3), (0, 2), (3,)])
def test_the_share_of_what_cannot_be_trained_goes_to_the_others(pattern, dead):
    trainable = [index not in dead for index in range(4)]
    options = {"density": 0.02, "density_pattern": pattern, "names": NAMES}
    counts = layer_budgets(SHAPES, **options, trainable=trainable)
    assert sum(counts) == total_budget(SHAPES, **options)
    assert all(counts[index] == 0 for index in dead)
    assert all(count <= rows * columns for count, (rows, columns) in zip(counts, SHAPES))
    if pattern == {"q_proj": 0.5} and dead == (1,):
        assert counts[0] + counts[2] == 18


def test_a_budget_that_the_trainable_matrices_cannot_hold_is_refused():
    with pytest.raises(SpftConfigError, match="235 values is more than the 69 entries of the matrices that can be"):
        layer_budgets(SHAPES, num_values=235, trainable=[True, True, True, False])


@pytest.mark.parametrize("density", [1e-9, 0.1, 1 / 3, 0.999, 1.0])
def test_bounds_around_the_density_can_always_be_kept(density):
    total = total_budget(SHAPES, density=density)
    fewest, most = share_bounds(SHAPES, total, density, density)
    assert sum(fewest) <= total <= sum(most)
    assert all(0 <= high - low <= 1 for low, high in zip(fewest, most))


def test_bounds_are_those_of_the_decimal_number():
    # in binary 0.1 x 30 is above 3 and 0.29 x 100 below 29
    assert share_bounds([(5, 6)], 3, None, 0.1) == ([0], [3])
    assert share_bounds([(10, 10)], 50, 0.29) == ([29], [100])


@pytest.mark.parametrize(
    ("total", "bounds", "part"),
    [(10, (0.5, None), "`min_density: 0.5` cannot be kept: it allows no fewer"),
     (300, (None, 0.5), "`max_density: 0.5` cannot be kept: it allows no more")],
)  # fmt: skip
def test_bounds_that_cannot_be_kept_are_refused(total, bounds, part):
    with pytest.raises(SpftConfigError, match=part):
        share_bounds(SHAPES, total, *bounds)


def test_what_blocks_may_leave():
    assert missing_allowed(SHAPES, None, "layer", False) == 0
    assert missing_allowed(SHAPES, (4, 8), "layer", True) == 31
    assert missing_allowed(SHAPES, (4, 8), "global", True) == (4 * 5 - 1) + (3 * 8 - 1) + 0 + 31
