"""What a merge makes of the tensors of a base checkpoint, and how exact it is.

Symbols: W is a weight of the base, Q(W) what a quantized base holds of it, S the adapter's sparse delta. Training
computed with W + S, or with Q(W) + S on a quantized base, or with the entries of W + S in Q(W) where it was repaired.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.exactness import Exactness, rounding
from axolotl_spft.checkpoint.group_entries import GroupEntries
from axolotl_spft.checkpoint.keys import Group
from axolotl_spft.checkpoint.quantized import Quantizer
from axolotl_spft.checkpoint.tied_weights import Source, place
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.ops.weight.scatter import rounded_sum
from axolotl_spft.ops.weight.stacked import as_matrix, as_stored


class MergedWeights:
    """The tensors of a merged checkpoint by their keys in the base checkpoint.

    Args:
        quantizer: what training quantized the base with, if it did.
        onto_quantized: whether the merged weights are Q(W) + S instead of W + S.

    Attributes:
        additional: key -> tensor, which the base checkpoint does not have: heads, and weights that were tied.
        new: those of ``additional`` that no weight of the base was tied to.
        unties: whether what was trained parts weights that the base ties.

    Raises:
        SpftFileError: the adapter's modules or their shapes are not those of the base.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        adapter: SavedAdapter,
        quantizer: Quantizer | None = None,
        onto_quantized: bool = False,
    ):
        self._base, self._quantizer, self._onto_quantized = base, quantizer, onto_quantized
        # by the parameter, and the tensor of the checkpoint where it is made out of several
        self._measured: dict[tuple[str, str], Exactness] = {}
        self._lock = threading.Lock()
        self._made: dict[str, Tensor] = {}
        self._given = adapter.embeddings
        places = place(base, adapter)
        self._module_of = dict(places.deltas)
        self._deltas = {name: adapter.deltas[module] for name, module in places.deltas.items()}
        self._whole, self.unties, self.new = places.whole, places.unties, frozenset(places.new)
        quantized = quantizer.modules if quantizer is not None and onto_quantized else ()
        for module in quantized:
            if base.has(module):
                self._module_of.setdefault(base.parameter(module), module)
        self._round = {base.parameter(module) for module in quantized if base.has(module)}
        self._entries = GroupEntries(base, self._deltas, self._module_of)
        self.additional = {name: self._apart(name, source, adapter) for name, source in places.apart.items()}
        self.additional |= {name: tensor.to(_dtype_of(base)) for name, tensor in places.new.items()}

    def _apart(self, name: str, source: Source, adapter: SavedAdapter) -> Tensor:
        """The tensor of a parameter that was tied to one which the checkpoint has."""
        stored = self._base.keys.tied[name]
        if isinstance(source, Tensor):
            (key, *_) = self._base.keys.group_of[stored].keys
            return source.to(self._base.shards.dtype(key))
        module, delta = source or name.removesuffix(".weight"), adapter.deltas.get(source or "")
        return self._merged(self._base.read_parameter(stored), name, module, delta)

    def changed(self, key: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Dtype and shape of the tensor under ``key``, if the merge changes it."""
        names = self._base.keys.parameters_of.get(key, [])
        if not any(name in self._deltas or name in self._whole or name in self._round for name in names):
            return None
        whole = self._whole.get(names[0], self._given.get(names[0])) if self._base.keys.is_plain(names[0]) else None
        shape = self._base.shards.shape(key) if whole is None else tuple(whole.shape)
        return self._base.shards.dtype(key), shape

    def make(self, key: str) -> Tensor:
        """The merged tensor under ``key``."""
        if key in self.additional:
            return self.additional[key]
        group = self._base.keys.group_of[self._base.keys.parameters_of[key][0]]
        if group.converter is None:
            return self._parameter(group.first_name).to(self._base.shards.dtype(key))
        if not any(self._is_made_whole(name) for name in self._base.keys.parameters_of[key]):
            return self._with_entries(key)
        with self._lock:
            if key not in self._made:
                self._made |= self._take_apart(group)
            return self._made.pop(key)

    @property
    def exactness(self) -> dict[str, Exactness]:
        """Of each parameter with a delta, as far as it was made."""
        found: dict[str, Exactness] = {}
        for name, key in sorted(self._measured):
            found.setdefault(name, Exactness()).add(self._measured[name, key])
        return found

    def _is_made_whole(self, name: str) -> bool:
        """Whether more of a parameter is needed than the entries of its delta."""
        quantized = self._quantizer is not None and self._module_of.get(name) in self._quantizer.modules
        return name in self._whole or name in self._round or quantized

    def _with_entries(self, key: str) -> Tensor:
        """The tensor under ``key`` with the entries that deltas change, and nothing read but itself."""
        tensor = self._base.shards.read(key)
        flat = tensor.view(-1)
        for name, at, chosen in self._entries.take(key):
            delta = self._deltas[name]
            before, values = flat[at], delta.values[chosen]
            if delta.originals is not None:
                originals = delta.originals[chosen]
                self._left_quantized(self._module_of[name], before, None, originals)
                before = originals.to(before.dtype)
            flat[at] = result = rounded_sum(before, values)
            self._measured[name, key] = rounding(before, values, result)
        return tensor

    def _parameter(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name]
        return self._merged(self._base.read_parameter(name), name, self._module_of[name], self._deltas.get(name))

    def _take_apart(self, group: Group) -> dict[str, Tensor]:
        """The tensors of the checkpoint that become the merged parameters of a group, in one memory."""
        keys, shards = self._base.keys, self._base.shards
        tensors = {key: shards.read(key) for key in group.keys}
        flat = torch.cat([tensors[key].flatten() for key in group.keys])
        made = group.convert(tensors, keys.config)
        del tensors
        for name, places in keys.places(group).items():
            parameter = self._whole.get(name)
            if parameter is None and name in self._module_of:
                parameter = self._merged(made[name], name, self._module_of[name], self._deltas.get(name))
            if parameter is not None:
                flat[places.flatten().to(torch.int64)] = parameter.flatten().to(flat.dtype)
        # together they have the widest dtype of the group
        return {
            key: flat[first:last].view(shards.shape(key)).to(shards.dtype(key))
            for key, (first, last) in keys.offsets(group).items()
        }

    def _merged(self, stored: Tensor, name: str, module: str, delta: SavedDelta | None) -> Tensor:
        """The merged parameter ``name``, made from what the base has ``stored`` for it, in the same form."""
        stored = self._given.get(name, stored)
        transposed = module in self._base.transposed
        weight = as_matrix(stored, transposed).contiguous()
        if delta is not None:
            self._base.check_shape(module, tuple(weight.shape), delta.shape)
        rounded = None
        if self._quantizer is not None and module in self._quantizer.modules:
            rounded = self._quantizer.round_trip(weight)
        merged = weight if rounded is None or not self._onto_quantized else rounded.clone()
        if delta is not None:
            at = positions(delta.mask, weight.shape[1])
            before, start = (each.view(-1)[at] for each in (merged, weight if rounded is None else rounded))
            if delta.originals is not None:
                quantized = None if rounded is None else start
                left = self._left_quantized(module, weight.view(-1)[at], quantized, delta.originals)
                start = delta.originals.to(start.dtype)
                before = torch.where(left, before, delta.originals.to(before.dtype))
            trained = rounded_sum(start, delta.values)
            result = rounded_sum(before, delta.values).to(weight.dtype)
            exactness = rounding(before, delta.values, result)
            merged = merged.clone() if merged is weight else merged
            merged.view(-1)[at] = result.to(merged.dtype)
            if rounded is not None:
                # the buffer of Q(W) becomes what training computed with
                rounded.view(-1)[at] = trained
                exactness.compare(merged.to(weight.dtype), rounded)
            self._measured[name, ""] = exactness
        merged = merged.to(weight.dtype)
        return as_stored(merged, stored.shape, transposed)

    def _left_quantized(self, module: str, entries: Tensor, quantized: Tensor | None, originals: Tensor) -> Tensor:
        """Where an adapter's ``originals`` are not W but Q(W): in a sum, at the positions of one that repairs nothing.

        Args:
            entries, quantized: W and Q(W) at the positions, if that is known.
        """
        left = entries.to(originals.dtype) != originals
        if not left.any():
            return left
        # another device may round Q(W) otherwise
        known = quantized is not None and torch.allclose(
            quantized[left].double(), originals[left].double(), rtol=4 * torch.finfo(originals.dtype).eps, atol=0
        )
        if not known:
            raise SpftFileError(
                f"{module}: the weights before quantization that the adapter holds are not those of "
                f"{self._base.shards.folder}: name the unquantized base model that was trained"
                + (
                    " (for a sum with an adapter that repairs nothing, add how it was quantized: `--quantization nf4`)"
                    if quantized is None
                    else ""
                )
            )
        return left


def _dtype_of(base: BaseCheckpoint) -> torch.dtype:
    """The dtype of most of the base, for tensors that it does not have."""
    dtypes = [base.shards.dtype(key) for key in base.shards.file_of]
    return max((dtype for dtype in set(dtypes) if dtype.is_floating_point), key=dtypes.count)
