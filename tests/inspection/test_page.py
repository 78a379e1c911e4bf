"""The page, and what it shares with the picture."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from axolotl_spft.inspection.inspect import inspect_files
from axolotl_spft.inspection.page import page
from axolotl_spft.inspection.panels import BINS, Curves, HeatMap, Histogram, round_up, sections, tick_step
from axolotl_spft.inspection.svg import WIDTH
from axolotl_spft.salience.mask_file import save_masks
from axolotl_spft.tools.cli import spft
from tests.inspection.matrices import random_matrix

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.a_module_with_quite_a_long_name_that_has_no_place<&>")


def write_mask(path, layers: int, seed: int = 0) -> None:
    matrices = [
        random_matrix(f"model.layers.{layer}.{kind}", 7, 11, 5 + layer % 3, seed + layer)
        for layer in range(layers)
        for kind in KINDS
        # the last layer lacks one
        if (layer, kind) != (layers - 1, KINDS[1])
    ]
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    save_masks(path, {matrix.name: matrix.mask for matrix in matrices}, shapes, {"salience": "gradient"})


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for layers, seed in ((2, 0), (80, 0), (80, 1)):
        write_mask(folder / f"{layers}_{seed}.safetensors", layers, seed)
    return folder


def drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]


@pytest.mark.parametrize("names", [["2_0"], ["80_0"], ["80_0", "80_1"]], ids=" ".join)
def test_the_page_stands_alone_and_nothing_is_cut_off(masks, names):
    inspection = inspect_files([masks / f"{name}.safetensors" for name in names])
    html = page(inspection)
    assert not re.search(r"(src|href)=|https?:|@import|url\(|<script", html)
    found = drawings(html)
    assert len(found) == (4 if len(names) == 1 else 9)
    for drawing in found:
        _, _, width, height = map(float, drawing.get("viewBox").split())
        assert width == WIDTH
        for element in drawing.iter():
            if element.tag == "text":
                length = 7.2 * len(element.text)
                start = (
                    float(element.get("x")) - {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")] * length
                )
                assert start >= 0 and start + length <= width and float(element.get("y")) <= height - 6, element.text
            if element.tag == "rect":
                assert float(element.get("x")) + float(element.get("width")) <= width
                assert float(element.get("y")) + float(element.get("height")) <= height


def test_every_cell_of_the_heat_map_tells_its_number(masks):
    inspection = inspect_files([masks / "80_0.safetensors"])
    density = drawings(page(inspection))[0]
    titles = [title.text for title in density.iter("title")]
    assert len(titles) == 80 * 3 and "up_proj, layer 79: no trained entry" in titles
    assert f"q_proj, layer 4: {100 * 6 / 77:.3g}%" in titles


def test_panels_hold_the_figures(masks):
    panels = sections(inspect_files([masks / "80_0.safetensors"]))[0].panels
    maps = {panel.title: panel for panel in panels if isinstance(panel, HeatMap)}
    assert maps["Density"].cells[0][4] == 6 / 77 and maps["Density"].cells[1][79] is None
    assert maps["Density"].top == pytest.approx(0.1)
    rows = next(panel for panel in panels if isinstance(panel, Curves))
    assert all(
        line[0] == 0 and line[-1] == pytest.approx(1) and list(line) == sorted(line) for line in rows.lines.values()
    )
    assert not any(isinstance(panel, Histogram) for panel in panels)


@pytest.mark.parametrize("values", [torch.tensor([0.0, 1e-12, -0.5, 0.5]), torch.tensor([0.25]), torch.zeros(3)])
def test_histogram_counts_every_value_once(values):
    from axolotl_spft.inspection.panels import _histogram

    histogram = _histogram(values.abs())
    if not values.any():
        assert histogram is None
        return
    assert sum(histogram.counts) == (values != 0).sum() and len(histogram.counts) == BINS
    assert ("exactly 0" in histogram.x_label) == bool((values == 0).any())


def test_scales_end_at_round_numbers():
    assert [round_up(value) for value in (0, 0.03, 0.031, 1.1, 9)] == pytest.approx([1, 0.03, 0.04, 1.2, 10])
    assert [tick_step(count, 12) for count in (2, 12, 13, 80, 500)] == [1, 1, 2, 10, 50]


def test_picture_and_page_are_written(masks, tmp_path):
    picture, html = tmp_path / "new/mask.png", tmp_path / "new/mask.html"
    arguments = ["inspect", str(masks / "80_0.safetensors"), str(masks / "80_1.safetensors")]
    result = CliRunner().invoke(
        spft, [*arguments, "--picture", str(picture), "--page", str(html)], catch_exceptions=False
    )
    assert result.exit_code == 0 and "Jaccard" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and html.read_text().startswith("<!doctype html>")
    assert {path.name for path in html.parent.iterdir()} == {"mask.png", "mask.html"}


def test_a_picture_that_cannot_be_drawn_is_found_before_anything_is_read(masks, tmp_path, monkeypatch):
    # no mask file: reading it would fail
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    arguments = ["inspect", str(tmp_path / "other.safetensors"), "--picture"]
    wrong = CliRunner().invoke(spft, [*arguments, str(tmp_path / "mask.bmp")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = CliRunner().invoke(spft, [*arguments, str(tmp_path / "mask.png")])
    assert (wrong.exit_code, missing.exit_code) == (2, 2)
    assert "must end with one of .png" in wrong.output and "`--picture` needs matplotlib" in missing.output
