from __future__ import annotations

import json

import pytest

from axolotl_spft.bench.mask_statistics import MaskStatistics, shares_of_area
from axolotl_spft.bench.options import DEFAULT_STATISTICS
from axolotl_spft.errors import SpftFileError

POINTS = [
    {"density": 0.001, "row_share": 0.1, "column_share": 0.2, "union_share": 0.3, "area": 0.02},
    {"density": 0.1, "row_share": 0.5, "column_share": 0.8, "union_share": 0.9, "area": 0.4},
]
OTHER = [{"density": 0.01, "row_share": 0.5, "column_share": 0.3, "union_share": 0.4, "area": 0.15}]
STATISTICS = MaskStatistics({"gradient/layer": {"q_proj": POINTS, "up_proj": OTHER}})


@pytest.mark.parametrize(
    "density, shares",
    [(0.001, (0.1, 0.2, 0.3)), (0.01, (0.3, 0.5, 0.6)), (0.1, (0.5, 0.8, 0.9)), (1e-5, (0.1, 0.2, 0.3))],
)
def test_shares_are_interpolated_over_the_logarithm_of_the_density(density, shares):
    assert STATISTICS.shares("gradient", "layer", "q_proj", density) == pytest.approx(shares)


def test_an_unknown_module_type_gets_the_mean_of_the_others():
    assert STATISTICS.shares("gradient", "layer", "c_attn", 0.01) == pytest.approx((0.4, 0.4, 0.5))


@pytest.mark.parametrize("density", [0.09, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("module", ["q_proj", "up_proj"])
def test_there_is_always_room_for_the_entries(density, module):
    rows, columns, _ = STATISTICS.shares("gradient", "layer", module, density)
    assert density <= rows * columns <= 1


def test_an_area_is_covered_by_equal_shares():
    assert shares_of_area(0.09) == pytest.approx((0.3, 0.3, 1.0))


def test_what_was_not_recorded_is_named():
    with pytest.raises(SpftFileError, match=r"no masks of balanced/row, only gradient/layer"):
        STATISTICS.shares("balanced", "row", "q_proj", 0.01)


NO_UNION = '{"statistics": {"gradient/layer": {"q_proj": [{"density": 0.1, "row_share": 0.1, "column_share": 0.2}]}}}'


@pytest.mark.parametrize("content", [None, "{}", "[]", "no JSON", '{"statistics": []}', NO_UNION])
def test_a_missing_or_wrong_file_is_one_error_with_the_remedy(tmp_path, content):
    path = tmp_path / "statistics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpftFileError, match=r"statistics\.json.*--mask-statistics PATH"):
        MaskStatistics.read(path)


@pytest.mark.skipif(not DEFAULT_STATISTICS.is_file(), reason="not a checkout of the repository")
def test_the_recorded_statistics_are_plausible():
    recorded = json.loads(DEFAULT_STATISTICS.read_text())["statistics"]
    assert {"gradient/layer", "gradient/row", "balanced/layer"} <= recorded.keys()
    for kinds in recorded.values():
        for points in kinds.values():
            densities = [point["density"] for point in points]
            assert densities == sorted(densities)
            for point in points:
                # with the global scope a module type may get a small part of the density, or all of its matrices none
                assert 0 <= point["area"] <= 1 and 0 <= point["row_share"] <= 1
                assert 0 <= point["column_share"] <= point["union_share"] <= 1
    for module, points in recorded["gradient/layer"].items():
        assert all(point["density"] <= point["area"] + 1e-6 for point in points), module
