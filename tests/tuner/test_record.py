"""The record of a mask in the adapter's file."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft import SpftConfig
from axolotl_spft.errors import SpftFileError
from axolotl_spft.tuner.record import FILE_KEY, make_record, record_of, record_to_tensor

SHAPES = {"a.q_proj": (4, 10), "b.ü": (3, 7)}


def test_a_record_comes_back_as_it_was():
    record = make_record(
        SpftConfig(num_values=7, scope="row"), SHAPES, {"salience": "gradient", "samples": 9}, {"a": ["b.c"]}
    )
    tensor = record_to_tensor(record)
    assert (tensor.dtype, tensor.ndim) == (torch.uint8, 1)
    again = record_of({FILE_KEY: tensor, "base_model.model.a.q_proj.spft_columns": torch.zeros(0)})
    assert again["shapes"] == {"a.q_proj": [4, 10], "b.ü": [3, 7]}
    assert again["mask_source"] == {"salience": "gradient", "samples": 9}
    assert again["tied"] == {"a": ["b.c"]}
    assert (again["options"]["num_values"], again["options"]["density"], again["options"]["scope"]) == (7, None, "row")
    assert not {"target_modules", "mask_path", "nnz"} & set(again["options"])


def test_a_file_without_one_has_an_empty_one():
    assert record_of({}) == {}


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xfe",
        b"[1]",
        b'{"options": {}, "shapes": {"a": [1]}, "mask_source": null}',
        b'{"options": {}, "shapes": {"a": [1, "2"]}, "mask_source": null}',
        b'{"options": {"density": 7}, "shapes": {}, "mask_source": null}',
        b'{"options": {}, "shapes": {}, "mask_source": "x"}',
        b'{"options": {}, "shapes": {}, "mask_source": null, "tied": {"a": "b"}}',
        b'{"options": {}, "shapes": {}, "mask_source": null, "trained_on": {"dtype": "uint8", "quantization": null}}',
        b'{"options": {}, "shapes": {}, "mask_source": null, "trained_on": {"dtype": "float32", "quantization": 4}}',
        b'{"options": {}, "shapes": {}, "mask_source": null, "trained_on": null}',
    ],
)
def test_a_damaged_record_is_one_clear_error(bad):
    with pytest.raises(SpftFileError, match=r"record .* is damaged: load an intact copy"):
        record_of({FILE_KEY: torch.tensor(list(bad), dtype=torch.uint8)})


def test_options_of_a_later_version_are_passed_over():
    record = make_record(SpftConfig(), SHAPES, None, {})
    record["options"]["of_tomorrow"] = 3
    assert record_of({FILE_KEY: record_to_tensor(record)})["mask_source"] is None
