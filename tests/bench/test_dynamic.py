"""The benchmark of dynamic masks, and the figure that the page tells of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from integration.bench import dynamic

ROOT = Path(__file__).parents[2]


def test_two_trainings_take_turns_and_one_reselects(tiny_shape, monkeypatch):
    monkeypatch.setattr(dynamic, "STEPS", 6)
    monkeypatch.setattr(dynamic, "EVERY", 3)
    options = argparse.Namespace(model=tiny_shape, width=None, tokens=12, dtype="fp32", device="cpu", threads=None)
    record = dynamic.measure(options)
    assert record["ratio"] == record["dynamic_seconds"] / record["static_seconds"]
    assert record["steps_per_reselection"] > 0
    assert record["ratio_by_reselections"] == 1 + record["steps_per_reselection"] / 3


def test_the_page_tells_the_recorded_figures():
    record = json.loads((ROOT / "integration/bench/dynamic.json").read_text())
    assert (record["steps"], record["every"]) == (200, 100)
    page = (ROOT / "axolotl_spft/dynamic/README.md").read_text()
    for figure in ("ratio", "ratio_by_reselections", "steps_per_reselection"):
        assert f"{record[figure]:.2f}" in page, figure
    assert max(record["ratio"], record["ratio_by_reselections"]) <= 1.05
