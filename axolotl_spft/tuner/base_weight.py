"""Access to the base layer's weight: plain, quantized, shared or stored transposed.

A plain weight that belongs to one layer alone holds W + S itself: the entries of the mask are assigned, which needs no
copy and can be repeated, and reverting assigns the original entries back, bit for bit. Any other weight (quantized,
shared, partitioned by ZeRO-3) is made afresh for each use: dequantized or cloned, S added, dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from axolotl_spft.engine.zero3 import gathered, is_partitioned
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.linear import Delta
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.ops.weight.dequantize import dequantize_4bit
from axolotl_spft.ops.weight.scatter import add_at_, assign_, assign_sum_


class Written(NamedTuple):
    """A sparse delta that a plain weight holds; values and originals are (nnz)."""

    values: Tensor
    mask: Mask
    originals: Tensor


class Replaced(NamedTuple):
    """The base layer, its parameters and its quantization state from before a merge."""

    base_layer: nn.Module
    parameters: dict[str, nn.Parameter | None]
    state: object


class BaseWeight:
    """Mixin of a tuner layer: W, W + S, and the way back to W.

    The layer provides ``get_base_layer()``, ``quantization_backend``, ``in_features`` and ``out_features``.

    Attributes:
        transposed: whether the weight is stored as (in_features, out_features).
    """

    quantization_backend: QuantizationBackend | None
    transposed: bool
    shared_weight: bool = False
    _written: Written | None = None
    # what was written for the forward pass that runs
    _ahead: Written | None = None
    _in_place: bool | None = None
    _undo_merge: list[Replaced | list[tuple[Tensor, Tensor]]]

    @property
    def forward_only(self) -> bool:
        """Whether the weight cannot be read at all (GPTQ, AWQ, ...)."""
        return self.quantization_backend is not None and not self.quantization_backend.supports_merge

    @property
    def keeps_gathered_weight(self) -> bool:
        """Whether the base layer's own forward would keep a weight that ZeRO-3 has gathered until backward."""
        return self.quantization_backend is not None and not self.forward_only and is_deepspeed_zero3_enabled()

    @property
    def in_place(self) -> bool:
        """Whether the weight may hold W + S itself."""
        if self._in_place is None:
            self._in_place = self._may_hold_delta()
        return self._in_place

    def share_weight(self, shared: bool) -> None:
        """Say whether another module uses the weight too."""
        self.revert()
        self.shared_weight = shared
        self._in_place = None

    def _may_hold_delta(self) -> bool:
        if self.quantization_backend is not None or self.shared_weight or is_deepspeed_zero3_enabled():
            return False
        weight = self.get_base_layer().weight
        return (
            type(weight) in (nn.Parameter, Tensor)
            and weight.is_floating_point()
            and weight.is_contiguous()
            and not weight.is_meta
            # transformers does not yet know of ZeRO-3 while a saved adapter is loaded
            and not is_partitioned(weight)
        )

    def storage_positions(self, mask: Mask) -> Tensor:
        """Where the mask's entries stand in the flattened weight as it is stored: (nnz) int64."""
        return positions(mask, self.in_features, self.transposed)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def read_weight(self) -> Tensor:
        """W as (out_features, in_features); do not write to it."""
        self.revert()
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        weight = self.get_base_layer().weight
        if is_partitioned(weight):
            with gathered([weight]):
                return self._oriented(weight.detach().clone())
        return self._oriented(weight.detach())

    def read_originals(self, mask: Mask) -> Tensor:
        """The entries of W at the mask (nnz), which `revert` puts back; empty where nothing is written in place."""
        if self.forward_only or not self.in_place:
            return torch.empty(0, device=mask.columns.device)
        self.revert()
        return self.get_base_layer().weight.detach().take(self.storage_positions(mask))

    def effective_weight(self, values: Tensor, delta: Delta) -> Tensor:
        """W + S as (out_features, in_features), to be read at once: the next call may overwrite it.

        Args:
            values: (nnz), nnz >= 1.
            delta: its originals come from `read_originals`.
        """
        held = self._written
        if held is not None and held is self._ahead and held.mask is delta.mask:
            return self._oriented(self.get_base_layer().weight)
        if self.in_place:
            return self._oriented(self._write(Written(values.detach(), delta.mask, delta.originals)))
        return self._oriented(self._fresh_sum([(values, delta.mask)]))

    def plain_weight(self) -> Tensor:
        """W as (out_features, in_features), to be read at once, of a weight that is made afresh for each use."""
        return self._oriented(self._fresh_sum([]))

    def effective_weight_again(self, values: Tensor, delta: Delta) -> AbstractContextManager[Tensor]:
        """`effective_weight` for the backward pass: afterwards the weight holds what it held before.

        Between forward and backward another adapter may have been chosen, or all disabled.
        """
        held = self._written
        if held is not None and _same(held.mask, delta.mask) and _same_values(held.values, values):
            return nullcontext(self._oriented(self.get_base_layer().weight))
        if self.in_place:
            return self._written_for_now(values, delta)
        return nullcontext(self._oriented(self._fresh_sum([(values, delta.mask)])))

    @contextmanager
    def _written_for_now(self, values: Tensor, delta: Delta) -> Iterator[Tensor]:
        held = self._written
        self.revert()
        weight = self.get_base_layer().weight.data
        # not the originals: the adapter may have been merged since
        before = weight.take(self.storage_positions(delta.mask))
        try:
            assign_sum_(weight, delta.mask, delta.originals.to(weight.dtype), values.detach(), self.transposed)
            yield self._oriented(weight)
        finally:
            assign_(weight, delta.mask, before, self.transposed)
            if held is not None:
                self._write(held)

    def _write(self, new: Written) -> Tensor:
        held = self._written
        if held is not None:
            if not _same(held.mask, new.mask):
                self.revert()
            elif held is self._ahead and _same_values(held.values, new.values):
                return self.get_base_layer().weight.data
        # .data: a layer may run several times before its backward pass, and assigning the same entries again is no
        # change that autograd should refuse; it sees a change of the values by the version of `values`
        weight = self.get_base_layer().weight.data
        # the base layer may have been cast by itself
        assign_sum_(weight, new.mask, new.originals.to(weight.dtype), new.values, self.transposed)
        # past torch.nn.Module's own assignment, which takes as long as launching a kernel
        self.__dict__["_written"] = new
        return weight

    def revert(self) -> None:
        """Put W back, bit for bit, where it holds W + S."""
        if self._written is not None:
            written, self._written = self._written, None
            weight = self.get_base_layer().weight.data
            assign_(weight, written.mask, written.originals.to(weight.dtype), self.transposed)

    def _fresh_sum(self, deltas: list[tuple[Tensor, Mask]]) -> Tensor:
        """A new tensor with W plus all deltas (values, mask), in the layout of storage."""
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None:
            weight = dequantize_4bit(getattr(base_layer, "weight", None))
            if weight is None:
                weight = self.quantization_backend.get_base_weight(base_layer)
        else:
            weight = base_layer.weight.detach().clone(memory_format=torch.contiguous_format)
        for values, mask in deltas:
            add_at_(weight, mask, values.detach(), self.transposed)
        return weight

    def merge_deltas(self, deltas: list[Written], check_finite: bool) -> None:
        """Make the base layer's own weight W plus all deltas.

        Raises:
            SpftError: the base layer's weight cannot be rewritten.
            ValueError: ``check_finite`` and the sum holds a NaN or an infinity.
        """
        if self.forward_only:
            raise SpftError(
                f"a {self.quantization_backend.backend_name} layer cannot be merged: its weight cannot be rewritten; "
                "keep the adapter unmerged, or merge into the unquantized base model"
            )
        self.revert()
        merge = self._merge_in_place if self.in_place else self._merge_by_replacing
        self._undo_merge.append(merge(deltas, check_finite))

    def unmerge_deltas(self) -> None:
        """Undo every `merge_deltas`, bit for bit."""
        while self._undo_merge:
            undo = self._undo_merge.pop()
            if isinstance(undo, Replaced):
                self.base_layer = undo.base_layer
                base_layer = self.get_base_layer()
                base_layer._parameters.update(undo.parameters)
                if undo.state is not None:
                    base_layer.state = undo.state
            else:
                self._put_back(undo)

    def _put_back(self, entries: list[tuple[Tensor, Tensor]]) -> None:
        flat = self.get_base_layer().weight.data.view(-1)
        for at, before in reversed(entries):
            flat[at.to(flat.device)] = before.to(flat)

    def _merge_in_place(self, deltas: list[Written], check_finite: bool) -> list[tuple[Tensor, Tensor]]:
        weight = self.get_base_layer().weight.data
        flat = weight.view(-1)
        entries = [(at, flat[at]) for at in (self.storage_positions(delta.mask) for delta in deltas)]
        for (at, _), delta in zip(entries, deltas):
            add_at_(weight, delta.mask, delta.values.detach(), self.transposed)
            if check_finite and not torch.isfinite(flat[at]).all():
                self._put_back(entries)
                raise _broken_adapter()
        return entries

    def _merge_by_replacing(self, deltas: list[Written], check_finite: bool) -> Replaced:
        weight = self._fresh_sum([(delta.values, delta.mask) for delta in deltas])
        if check_finite and not torch.isfinite(weight).all():
            raise _broken_adapter()
        base_layer = self.get_base_layer()
        undo = Replaced(self.base_layer, dict(base_layer._parameters), copy.copy(getattr(base_layer, "state", None)))
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight)
        else:
            # a new parameter, so that a module that shares the old one keeps it
            base_layer.weight = nn.Parameter(weight, requires_grad=False)
        return undo


def keep_dequantizable(base_layer: nn.Module) -> None:
    """Stop bitsandbytes from repacking a 4-bit weight for AVX512 in its first evaluation on a CPU.

    The repacked weight can be multiplied but no longer dequantized.
    """
    if getattr(base_layer, "support_avx512bf16_for_cpu", False):
        quant_state = getattr(base_layer.weight, "quant_state", None)
        if getattr(quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            base_layer.weight.data, base_layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                base_layer.weight.data, quant_state
            )
        base_layer.support_avx512bf16_for_cpu = False


def _same(mask: Mask, other: Mask) -> bool:
    return mask is other or mask.columns.data_ptr() == other.columns.data_ptr()


def _same_values(values: Tensor, other: Tensor) -> bool:
    return values.data_ptr() == other.data_ptr()


def _broken_adapter() -> ValueError:
    return ValueError("NaNs detected in the merged weights. The adapter seems to be broken")
