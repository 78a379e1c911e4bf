"""A mask on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import empty_mask, mask_from_positions
from axolotl_spft.salience.mask_file import load_masks, save_masks

SHAPES = {"a.q_proj": (4, 10), "b.v_proj": (3, 7)}


def masks():
    return {"a.q_proj": mask_from_positions(torch.tensor([0, 13, 39]), 4, 10), "b.v_proj": empty_mask(3, 7)}


def test_saved_and_read_again(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_masks(path, masks(), SHAPES, {"salience": "gradient", "samples": 8})
    again, source = load_masks(path, SHAPES, "Name another one")
    assert source == {"salience": "gradient", "samples": 8}
    assert list(again) == list(SHAPES)
    for name, mask in masks().items():
        for one, other in zip(mask, again[name]):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def edited(path, **changes):
    tensors = load_file(path)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"a__q_proj__spft_columns": None}, "a.q_proj: not in the file"),
        ({"a__q_proj__spft_row_offsets": None}, "a.q_proj: spft_row_offsets missing"),
        ({"c__spft_columns": torch.empty(0, dtype=torch.uint16)}, "c: the model has no such targeted module"),
        ({"a__q_proj__spft_columns": torch.tensor([0, 10, 9]).to(torch.uint16)}, "a column lies outside 0..9"),
        ({"a__q_proj__spft_row_offsets": torch.tensor([0, 3, 2, 2, 3], dtype=torch.int32)}, "row offsets must rise"),
        ({"a__q_proj__spft_row_offsets": torch.tensor([0, 3], dtype=torch.int32)}, "2 row offsets, must be"),
        ({"a__q_proj__spft_columns": torch.tensor([0, 3, 9])}, "columns are torch.int64"),
        (
            {
                "a__q_proj__spft_columns": torch.tensor([5, 3, 9]).to(torch.uint16),
                "a__q_proj__spft_row_offsets": torch.tensor([0, 2, 2, 2, 3], dtype=torch.int32),
            },
            "columns must ascend",
        ),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path, changes, part):
    path = tmp_path / "mask.safetensors"
    save_masks(path, masks(), SHAPES, {})
    edited(path, **changes)
    with pytest.raises(SpftFileError) as caught:
        load_masks(path, SHAPES, "Name another one")
    assert part in str(caught.value)
    assert str(caught.value).endswith(". Name another one")


@pytest.mark.parametrize("source", ["not JSON", "[1]"])
def test_a_header_that_is_none_is_one_clear_error(tmp_path, source):
    path = tmp_path / "mask.safetensors"
    save_masks(path, masks(), SHAPES, {})
    save_file(load_file(path), path, metadata={"mask_source": source})
    with pytest.raises(SpftFileError, match="mask_source in its header is no JSON object"):
        load_masks(path, SHAPES, "Name another one")


def test_row_offsets_whose_differences_overflow_are_one_clear_error(tmp_path):
    path, top = tmp_path / "mask.safetensors", 2**31 - 1
    save_masks(path, masks(), SHAPES, {})
    edited(path, a__q_proj__spft_row_offsets=torch.tensor([0, top, -top - 1, -1, 3], dtype=torch.int32))
    with pytest.raises(SpftFileError, match="row offsets must rise"):
        load_masks(path, SHAPES, "Name another one")


def test_a_truncated_file_is_one_clear_error(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_masks(path, masks(), SHAPES, {})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SpftFileError, match="not a complete safetensors file"):
        load_masks(path, SHAPES, "Name another one")
