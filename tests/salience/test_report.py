"""The table about a mask."""

from __future__ import annotations

import torch

from axolotl_spft.ops.mask.csr import empty_mask, mask_from_positions
from axolotl_spft.salience.report import report_masks


def test_figures_and_table():
    masks = {
        "layers.0.q_proj": (mask_from_positions(torch.tensor([0, 1, 11]), 4, 10), 10),
        "layers.0.up_proj": (mask_from_positions(torch.tensor([5]), 2, 5), 5),
        "layers.1.q_proj": (empty_mask(4, 10), 10),
    }
    report = report_masks(masks, "salience gradient", 8)
    assert (report.selected, report.entries, report.samples) == (4, 90, 8)
    first = report.matrices[0]
    assert (first.selected, first.used_rows, first.used_columns) == (3, 2, 2)
    lines = str(report).splitlines()
    assert lines[0] == "Sparse mask: salience gradient"
    assert [line.split() for line in lines[2:]] == [
        # area: 2 rows x 2 columns of 80 entries
        ["q_proj", "2", "3", "3.75%", "25.00%", "10.00%", "5.00%"],
        ["up_proj", "1", "1", "10.00%", "50.00%", "20.00%", "10.00%"],
        ["total", "3", "4", "4.44%", "30.00%", "12.00%", "5.56%"],
    ]
