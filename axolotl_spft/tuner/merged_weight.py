"""Merging sparse deltas into the base layer's own weight, and the way back, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.weight.scatter import add_at_, restore_
from axolotl_spft.tuner.base_weight import BaseWeight, Replaced, assign_reversed
from axolotl_spft.tuner.offloading import is_offloaded, rewritten


class Part(NamedTuple):
    """The sparse delta of one adapter: values (nnz), their mask, and what a quantized W has there instead: (nnz)."""

    values: Tensor
    mask: Mask
    originals: Tensor | None


class MergedWeight(BaseWeight):
    """Mixin of a tuner layer: its base layer's weight becomes W plus deltas, and W again.

    Attributes:
        shares_base: whether layers of other methods may merge into the same weight: in a mixed model.
    """

    shares_base = False

    def merge_deltas(self, deltas: Mapping[str, Part], check_finite: bool) -> None:
        """Make the base layer's own weight W plus all deltas by adapter.

        Raises:
            SpftError: the base layer's weight cannot be rewritten.
            ValueError: ``check_finite`` and the sum holds a NaN or an infinity.
        """
        if self.forward_only:
            raise SpftError(
                f"a {self.quantization_backend.backend_name} layer cannot be merged: its weight cannot be rewritten; "
                "keep the adapter unmerged, or merge into the unquantized base model"
            )
        self.refuse_if_quantized_and_offloaded()
        self.revert()
        merge = self._merge_in_place if self.in_place else self._merge_by_replacing
        with rewritten(self.get_base_layer()):
            self._undo_merge.append(merge(deltas, check_finite))

    def refuse_if_quantized_and_offloaded(self) -> None:
        """Raise where a weight would have to be quantized anew that accelerate brings in without its scales."""
        if self.quantization_backend is not None and is_offloaded(self.get_base_layer()):
            raise SpftError(
                "a quantized base layer that is offloaded cannot be merged or unmerged: do it before the model is "
                "offloaded, or merge into the unquantized base model"
            )

    def refuse_if_merged(self, adapter_name: str) -> None:
        """Raise where deleting the adapter would leave its S in the base weight for good."""
        if adapter_name in self.merged_adapters:
            raise SpftError(f"adapter `{adapter_name}` is merged: call unmerge_adapter() before delete_adapter()")

    def unmerge_deltas(self) -> None:
        """Undo every `merge_deltas`, bit for bit; where others have merged into the weight since, by subtraction."""
        if self._undo_merge:
            self.refuse_if_quantized_and_offloaded()
        if self.shares_base:
            if self.repairs and any(name in self.spft_originals for name in self.merged_adapters):
                raise SpftError(
                    "a repaired adapter cannot be unmerged where another method's adapter has the same layer: its "
                    "entries were assigned, and what stood there before cannot be told; load the base model again"
                )
            self._subtract_merged()
            return
        with rewritten(self.get_base_layer()):
            while self._undo_merge:
                self._undo(self._undo_merge.pop())

    def _subtract_merged(self) -> None:
        self._undo_merge.clear()
        with rewritten(self.get_base_layer()):
            weight = self._fresh_weight()
            for name in self.merged_adapters:
                add_at_(weight, self.mask(name), -self.values(name).detach(), self.transposed)
            if self.quantization_backend is not None:
                self.quantization_backend.set_base_weight(self, weight)
            else:
                self.get_base_layer().weight.data.copy_(weight)

    def _undo(self, undo: Replaced | list[tuple[Tensor, Tensor]]) -> None:
        if isinstance(undo, Replaced):
            self._hold_base_layer(undo.base_layer)
            base_layer = self.get_base_layer()
            base_layer._parameters.update(undo.parameters)
            if undo.state is not None:
                base_layer.state = undo.state
            for reader, weight in zip(self.readers, undo.tied):
                reader.get_base_layer().weight = weight
        else:
            assign_reversed(self.stored_weight.data.view(-1), undo)

    def _merge_in_place(self, deltas: Mapping[str, Part], check_finite: bool) -> list[tuple[Tensor, Tensor]]:
        weight = self.stored_weight.data
        flat = weight.view(-1)
        entries = [(at, flat[at]) for at in (self.storage_positions(part.mask) for part in deltas.values())]
        for (at, _), (name, (values, mask, _)) in zip(entries, deltas.items()):
            add_at_(weight, mask, values.detach(), self.transposed)
            if check_finite and not torch.isfinite(flat[at]).all():
                assign_reversed(flat, entries)
                raise _broken_adapter(name)
        return entries

    def _merge_by_replacing(self, deltas: Mapping[str, Part], check_finite: bool) -> Replaced:
        weight = self._fresh_weight()
        for _, mask, originals in deltas.values():
            if originals is not None:
                restore_(weight, mask, originals.to(weight.dtype), self.transposed)
        for name, (values, mask, _) in deltas.items():
            add_at_(weight, mask, values.detach(), self.transposed)
            if check_finite and not torch.isfinite(weight).all():
                raise _broken_adapter(name)
        base_layer = self.get_base_layer()
        state = copy.copy(getattr(base_layer, "state", None))
        tied = [reader.get_base_layer().weight for reader in self.readers]
        replaced = base_layer._parameters
        if self.quantization_backend is None:
            # alone: another parameter of the same module may be merged after this one and unmerged before it
            replaced = {self.parameter_name: replaced[self.parameter_name]}
        undo = Replaced(self.base_layer, dict(replaced), state, tied)
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight)
        else:
            # a new parameter, so that a module that shares the old one keeps it
            merged = nn.Parameter(weight, requires_grad=False)
            setattr(base_layer, self.parameter_name, merged)
            for reader in self.readers:
                reader.get_base_layer().weight = merged
        return undo


def _broken_adapter(adapter_name: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
