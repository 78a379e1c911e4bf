"""Masks of the benchmark: computed by a timed pass, or drawn."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig
from axolotl_spft.bench.mask_statistics import MaskStatistics
from axolotl_spft.bench.masking import Masking, mask_model
from axolotl_spft.bench.memory import PeakMemory
from axolotl_spft.ops.mask.csr import used_columns
from tests.models import tiny_llama

CPU = torch.device("cpu")


def masked(salience: str, area: float | None = None):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.1, salience=salience, samples=3))
    return mask_model(model, Masking(CPU, PeakMemory(CPU, own_process=False), tokens=8, samples=2, area=area))


# the one without a metric reads the sample too, to see which modules are used
@pytest.mark.parametrize("salience", ["gradient", "random"])
def test_a_computed_mask_tells_what_its_pass_took(salience):
    report, cost = masked(salience)
    assert report.selected > 0
    assert cost.pass_seconds > 0 and cost.selection_seconds > 0


@pytest.mark.parametrize("area", [0.2, 0.5, 1.0])
def test_a_drawn_mask_covers_the_area(area):
    report, cost = masked("gradient", area)
    assert cost is None
    assert report.selected == masked("gradient")[0].selected
    used = sum(matrix.used_rows * matrix.used_columns for matrix in report.matrices) / report.entries
    assert used == pytest.approx(area, rel=0.15)


def test_drawn_masks_of_layers_with_one_input_share_columns_as_much_as_recorded():
    point = {"density": 0.1, "row_share": 0.6, "column_share": 0.5, "union_share": 0.55, "area": 0.3}
    statistics = MaskStatistics({"gradient/layer": {"any": [point]}})
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.1, target_modules=["q_proj", "k_proj", "v_proj"]))
    mask_model(model, Masking(CPU, PeakMemory(CPU, own_process=False), tokens=8, samples=2, statistics=statistics))
    for attention in (layer.self_attn for layer in model.base_model.model.model.layers):
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        used = [used_columns(reader.mask("default"), reader.in_features) for reader in readers]
        width = readers[0].in_features
        assert [len(each) / width for each in used] == pytest.approx([0.5] * 3, abs=1 / width)
        # without sharing it would be 0.875
        assert len(torch.cat(used).unique()) / width == pytest.approx(0.55, abs=0.1)
