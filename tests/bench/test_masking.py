"""Masks of the benchmark: computed by a timed pass, or drawn."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig
from axolotl_spft.bench.masking import Masking, mask_model
from axolotl_spft.bench.memory import PeakMemory
from tests.models import tiny_llama

CPU = torch.device("cpu")


def masked(salience: str, area: float | None = None):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.1, salience=salience, samples=3))
    return mask_model(model, Masking(CPU, PeakMemory(CPU, own_process=False), tokens=8, samples=2, area=area))


def test_a_computed_mask_tells_what_its_pass_took():
    report, cost = masked("gradient")
    assert report.selected > 0
    assert cost.pass_seconds > 0 and cost.selection_seconds > 0


def test_without_a_pass_only_the_selection_takes_time():
    _, cost = masked("random")
    assert cost.pass_seconds == 0 < cost.selection_seconds


@pytest.mark.parametrize("area", [0.2, 0.5, 1.0])
def test_a_drawn_mask_covers_the_area(area):
    report, cost = masked("gradient", area)
    assert cost is None
    assert report.selected == masked("gradient")[0].selected
    used = sum(matrix.used_rows * matrix.used_columns for matrix in report.matrices) / report.entries
    assert used == pytest.approx(area, rel=0.15)
