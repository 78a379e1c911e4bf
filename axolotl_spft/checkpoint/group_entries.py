"""Which entries of the tensors in a checkpoint get deltas, of parameters that are made out of several tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import SavedDelta
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.keys import Group
from axolotl_spft.ops.weight.stacked import by_expert, entries_of, shape_of


class Entries(NamedTuple):
    """What a tensor of the checkpoint gets of one parameter's delta.

    Attributes:
        parameter: whose delta it is.
        at: (n) int64, positions in the flattened tensor.
        values: (n) int64, which of the delta's values belong there.
    """

    parameter: str
    at: Tensor
    values: Tensor


class GroupEntries:
    """Finds the entries of each tensor of a group when one of them is asked for, and keeps those of the others.

    Files may hold the tensors of groups in any order, as experts do whose projections take turns. So a group is gone
    through once, and what is kept until the last of its tensors was taken is 12 bytes a value (16 of a group of 2^31
    entries): never more than about twice the adapter. Finding takes 8 to 14 bytes an entry, of one group at a time.

    Args:
        module_of: parameter -> the module whose delta it gets.
    """

    def __init__(self, base: BaseCheckpoint, deltas: Mapping[str, SavedDelta], module_of: Mapping[str, str]):
        self._base, self._keys, self._deltas, self._module_of = base, base.keys, deltas, module_of
        self._found: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    def take(self, key: str) -> list[Entries]:
        """What the tensor under ``key`` gets; it is forgotten then.

        Raises:
            SpftFileError: a parameter has another shape than its delta.
        """
        group = self._keys.group_of[self._keys.parameters_of[key][0]]
        with self._lock:
            if key not in self._found:
                self._found |= self._find(group)
            found = self._found.pop(key)
        first, _ = self._keys.offsets(group)[key]
        return [Entries(name, at.to(torch.int64) - first, values) for name, at, values in found]

    def _find(self, group: Group) -> dict[str, list[tuple[str, Tensor, Tensor]]]:
        offsets = self._keys.offsets(group)
        found: dict[str, list[tuple[str, Tensor, Tensor]]] = {key: [] for key in offsets}
        for name, places in self._keys.places(group).items():
            if name not in self._deltas:
                continue
            delta, module = self._deltas[name], self._module_of[name]
            transposed = module in self._base.transposed
            self._base.check_shape(module, shape_of(places, transposed), delta.shape)
            matrices = by_expert(places if places.ndim == 3 else places[None], transposed)
            at, order = entries_of(delta.mask, matrices).sort()
            ends = torch.searchsorted(at, torch.tensor([last for _, last in offsets.values()], dtype=at.dtype)).tolist()
            sizes = [end - start for start, end in zip([0, *ends], ends)]
            for key, *parts in zip(offsets, at.split(sizes), order.split(sizes)):
                found[key].append((name, *parts))
        return found
