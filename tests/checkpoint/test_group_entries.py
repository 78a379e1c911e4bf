"""Where the values of stacked experts stand in the tensors of a checkpoint, and what is kept of that."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.checkpoint.adapter import read_adapter
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.group_entries import GroupEntries
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import positions
from tests.checkpoint.saved import save_adapter, save_base
from tests.experts import PARAMETERS, tiny_mixtral

NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    base = save_base(folder / "base", lambda dtype: tiny_mixtral("eager", dtype))
    adapter = read_adapter(save_adapter(folder / "adapter", base, target_parameters=PARAMETERS))
    return BaseCheckpoint(base, tiny_mixtral()), adapter.deltas[NAME]


def kept_bytes(entries: GroupEntries) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for parts in entries._found.values()
        for part in parts
        for tensor in part[1:]
    }
    return sum(storages.values())


def test_each_value_stands_once_and_little_is_kept_until_the_last_tensor_is_taken(found):
    base, delta = found
    entries = GroupEntries(base, {NAME: delta}, {NAME: NAME})
    keys, stored = list(base.keys.group_of[NAME].keys), torch.zeros(delta.shape, dtype=base.read_matrix(NAME).dtype)
    seen, places = [], positions(delta.mask, delta.shape[1])
    for key in reversed(keys):
        for name, at, values in entries.take(key):
            assert name == NAME
            stored.view(-1)[places[values]] = base.shards.read(key).view(-1)[at]
            seen.append(values)
        assert kept_bytes(entries) == (0 if key == keys[0] else 12 * delta.mask.nnz)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(delta.mask.nnz))
    assert torch.equal(stored.view(-1)[places], base.read_matrix(NAME).view(-1)[places])


def test_experts_of_another_shape_are_named(found):
    base, delta = found
    other = type(delta)(delta.values, delta.mask, (delta.shape[0], delta.shape[1] + 1))
    with pytest.raises(SpftFileError, match=rf"{NAME} is \(\d+, 28\) in .* but \(\d+, 29\) in the adapter"):
        GroupEntries(base, {NAME: other}, {NAME: NAME}).take(next(iter(base.keys.group_of[NAME].keys)))
