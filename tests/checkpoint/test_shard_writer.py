"""One safetensors file made of another: copied bytes, new tensors, and the mark of a finished file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from axolotl_spft.checkpoint.shard_writer import is_written, write_shard
from axolotl_spft.checkpoint.shards import read_header
from axolotl_spft.errors import SpftFileError

MARK = {"mark": "one"}
TENSORS = {
    "kept": torch.arange(35, dtype=torch.float32).reshape(5, 7).bfloat16(),
    "replaced": torch.ones(3, 2),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}
NEW = {"replaced": torch.full((4, 2), 0.5, dtype=torch.float16), "added": torch.tensor([1.0, -2.0])}
SIZES = {"replaced": ("F16", (4, 2)), "added": ("F32", (2,))}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(TENSORS, path)
    return path


def write(path, source, make=NEW.__getitem__, progress=lambda count: None) -> None:
    with ThreadPoolExecutor(2) as pool:
        write_shard(path, source, read_header(source).entries, SIZES, make, MARK, pool, progress)


def test_tensors_are_copied_replaced_and_added(tmp_path, source):
    path, told = tmp_path / "new.safetensors", []
    write(path, source, progress=told.append)
    found, expected = load_file(path), TENSORS | NEW
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert sum(told) == sum(tensor.nbytes for tensor in expected.values())
    with safe_open(path, "pt") as file:
        assert file.metadata() == MARK
    # data begins at a multiple of 8 bytes, as readers that map the file want it
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_file_is_finished_when_it_is_whole_and_of_this_mark(tmp_path, source):
    path = tmp_path / "new.safetensors"
    assert is_written(path, MARK) is None
    write(path, source)
    assert is_written(path, MARK).metadata == MARK and is_written(path, {"mark": "two"}) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert is_written(path, MARK) is None


def test_what_fails_leaves_the_file_of_before_and_nothing_beside_it(tmp_path, source):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"before")

    def full(key: str):
        raise OSError(28, "No space left on device")

    with pytest.raises(SpftFileError, match=r"new.safetensors cannot be written \(No space left on device\)"):
        write(path, source, make=full)
    with pytest.raises(KeyError):
        write(path, source, make={}.__getitem__)
    assert path.read_bytes() == b"before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new.safetensors", "source.safetensors"]


@pytest.mark.parametrize("made", [NEW["replaced"].float(), NEW["replaced"][:3]])
def test_a_tensor_of_another_size_than_announced_is_not_written_over_its_neighbour(tmp_path, source, made):
    path = tmp_path / "new.safetensors"
    with pytest.raises(AssertionError, match=r"replaced was made as .* not \(torch.float16, \(4, 2\)\)"):
        write(path, source, (NEW | {"replaced": made}).__getitem__)
    assert not path.exists()
