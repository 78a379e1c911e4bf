"""Access to the base layer's weight: plain, quantized, shared or stored transposed.

At rest a weight holds W: that is what everybody sees who copies, averages, saves or overwrites the parameters. A plain
weight that belongs to one layer alone holds W + S while it is multiplied: S is added at the entries of the mask, which
needs no copy of the rest, and what stood there is put back afterwards, bit for bit. The layer does so by itself, or a
`Writer` for all layers of a model at once. Any other weight (quantized, shared, partitioned by ZeRO-3) is made afresh
for each use: dequantized or cloned, S added, dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from axolotl_spft.engine.zero3 import gathered, is_partitioned
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.linear import Delta
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.ops.weight.dequantize import dequantize_4bit
from axolotl_spft.ops.weight.scatter import add_at_, assign_sum_, restore_, write_sum_
from axolotl_spft.ops.weight.stacked import as_matrix
from axolotl_spft.tuner.holders import holds_alone, is_in_shared_memory
from axolotl_spft.tuner.offloading import brought_in, execution_device, is_offloaded

# held while weights are written or put back, and while experts compute: a second thread must not take W + S for W
WRITING = threading.RLock()


class Written(NamedTuple):
    """A sparse delta that a plain weight holds, and what stood at its entries before: each (nnz).

    Attributes:
        threads: those for whose passes it is held until they are over; to any other thread it may be lost at once.
        passes: autograd's numbers of the backward passes that it is held for; None for as long as a block runs.
    """

    values: Tensor
    mask: Mask
    originals: Tensor
    threads: Collection[int] = ()
    passes: set[int] | None = None

    def is_for(self, backward: int) -> bool:
        """Whether it is held until a backward pass is over."""
        return self.passes is None or backward in self.passes


class Writer(Protocol):
    """Writes W + S of many layers at once.

    Attributes:
        layers: all sparse layers of the model that it writes for.
    """

    layers: Sequence[BaseWeight]

    def write_for_backward(self) -> None:
        """Write for the rest of the backward pass that runs in this thread, if one does and it has not been tried."""

    def tell_missing(self) -> None:
        """Take note of a layer that had to write by itself."""


class Replaced(NamedTuple):
    """From before a merge: the base layer, its parameters and quantization state, and the weights of its readers."""

    base_layer: nn.Module
    parameters: dict[str, nn.Parameter | None]
    state: object
    tied: list[nn.Parameter]


class BaseWeight:
    """Mixin of a tuner layer: W, W + S, and the way back to W.

    The layer provides ``get_base_layer()``, ``quantization_backend``, ``in_features`` and ``out_features``.

    Attributes:
        parameter_name: of the weight in the base layer.
        transposed: whether the weight is stored as (in_features, out_features), or each expert's of three dimensions.
    """

    quantization_backend: QuantizationBackend | None
    parameter_name: str = "weight"
    transposed: bool
    shared_weight: bool = False
    _written: Written | None = None
    _writer: ref[Writer] | None = None
    _in_place: bool | None = None
    # of a 4-bit weight, from before it may be offloaded
    _quant_state: object | None = None
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
    def stored_weight(self) -> Tensor:
        """The weight as the base layer holds it: W, or W + S for as long as it is multiplied."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def loaded_dtype(self) -> torch.dtype | None:
        """The dtype of the weight, or the one that it had before it was quantized; None where it does not tell."""
        if self.quantization_backend is None:
            return self.stored_weight.dtype
        return getattr(self._quant_state, "dtype", None)

    @property
    def weight_device(self) -> torch.device:
        """Where the weight is multiplied."""
        return execution_device(self.get_base_layer()) or self.stored_weight.device

    @property
    def in_place(self) -> bool:
        """Whether the weight may hold W + S itself."""
        # accelerate's hooks may come later, and what they bring in may be the only copy of W
        if is_offloaded(self.get_base_layer()):
            return False
        # another thread may forget it at any time
        in_place = self._in_place
        if in_place is None:
            in_place = self._in_place = self._may_hold_delta()
        return in_place

    def share_weight(self, shared: bool) -> None:
        """Say whether another module uses the weight too."""
        self.revert()
        self.shared_weight = shared
        self._in_place = None

    def stop_writing(self) -> None:
        """Put W back, and write W + S into the weight no more: another model holds it too."""
        with WRITING:
            self.revert()
            self._in_place = False

    @property
    def is_plain(self) -> bool:
        """Whether the weight is of the kind that may hold W + S itself, wherever it lies now."""
        if self.quantization_backend is not None or self.shared_weight or is_deepspeed_zero3_enabled():
            return False
        # what the layer of another method inside multiplies is W
        if isinstance(self.base_layer, BaseTunerLayer) or is_offloaded(self.get_base_layer()):
            return False
        weight = self.stored_weight
        # transformers does not yet know of ZeRO-3 while a saved adapter is loaded
        return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not is_partitioned(weight)

    def _may_hold_delta(self) -> bool:
        if not self.is_plain:
            return False
        weight = self.stored_weight
        in_own_memory = weight.is_contiguous() and not weight.is_meta and not is_in_shared_memory(weight)
        return in_own_memory and holds_alone(self)

    def brought_in(self) -> AbstractContextManager[None]:
        """Within the block a base layer that accelerate offloads holds its tensors."""
        base_layer = self.get_base_layer()
        return brought_in(base_layer, self._quant_state) if is_offloaded(base_layer) else nullcontext()

    def storage_positions(self, mask: Mask) -> Tensor:
        """Where the mask's entries stand in the flattened weight as it is stored: (nnz) int64."""
        return positions(mask, self.in_features, self.transposed)

    def _oriented(self, weight: Tensor) -> Tensor:
        return as_matrix(weight, self.transposed)

    def read_weight(self) -> Tensor:
        """W as (out_features, in_features); do not write to it."""
        self.revert()
        with self.brought_in():
            weight = self.stored_weight
            partitioned = is_partitioned(weight)
            with gathered([weight] if partitioned else []):
                if self.quantization_backend is not None:
                    return self.quantization_backend.get_base_weight(self.get_base_layer())
                # what was gathered is gone after the block
                return self._oriented(weight.detach().clone() if partitioned else weight.detach())

    def effective_weight(self, values: Tensor, delta: Delta) -> AbstractContextManager[Tensor]:
        """W + S as (out_features, in_features), to be read within the block; afterwards the weight is as before.

        Args:
            values: (nnz), nnz >= 1.
            delta: where they stand. Between a forward pass and its backward pass another adapter may have been chosen,
                or all disabled or merged.
        """
        if not self._holds_for_this_pass(values, delta.mask):
            if self._undo_merge:
                return nullcontext(self._oriented(self._sum_before_merges(values, delta.mask)))
            if not self.in_place:
                return nullcontext(self._oriented(self._fresh_sum(values, delta.mask, delta.originals)))
            writer = None if self._writer is None else self._writer()
            if writer is not None:
                writer.write_for_backward()
            if not self._holds_for_this_pass(values, delta.mask):
                if writer is not None:
                    writer.tell_missing()
                return self._matrix_for_now(values, delta.mask)
        return nullcontext(self._oriented(self.stored_weight))

    def plain_weight(self) -> AbstractContextManager[Tensor]:
        """W as (out_features, in_features), to be read within the block; afterwards the weight is as before."""
        if not self.in_place:
            # a plain one is written by no layer
            return nullcontext(self._oriented(self.stored_weight.detach() if self.is_plain else self._fresh_weight()))
        # within a backward pass that is also one of a forward pass with S, it holds that
        return nullcontext(self._oriented(self.stored_weight)) if self._written is None else self._matrix_for_now()

    def _holds_for_this_pass(self, values: Tensor, mask: Mask) -> bool:
        held = self._written
        return held is not None and threading.get_ident() in held.threads and self._holds(values, mask)

    def _holds(self, values: Tensor, mask: Mask) -> bool:
        """Whether the weight holds W + S: for as long as the caller has `WRITING`."""
        held = self._written
        return held is not None and _same(held.mask.columns, mask.columns) and _same(held.values, values)

    @contextmanager
    def _matrix_for_now(self, *delta: Any) -> Iterator[Tensor]:
        with self._written_for_now(*delta) as weight:
            yield self._oriented(weight)

    @contextmanager
    def _written_for_now(self, values: Tensor | None = None, mask: Mask | None = None) -> Iterator[Tensor]:
        """Within the block the stored weight, which it yields, holds W + S, or W if no values are given."""
        with WRITING:
            held = self._written
            if values is not None and self._holds(values, mask):
                yield self.stored_weight.data
                return
            self.revert()
            try:
                yield self.stored_weight.data if values is None else self._write(values.detach(), mask)
            finally:
                self.revert()
                if held is not None:
                    self._write(held.values, held.mask, held)

    def _write(
        self, values: Tensor, mask: Mask, again: Written | None = None, passes: set[int] | None = None
    ) -> Tensor:
        # .data: autograd need not see a change that is gone before it looks; it sees one of the values by their version
        weight = self.stored_weight.data
        written = again or Written(values, mask, weight.new_empty(values.numel()), passes=passes)
        write_sum_(weight, mask, written.originals, values, self.transposed)
        # past torch.nn.Module's own assignment, which takes as long as launching a kernel
        self.__dict__["_written"] = written
        return weight

    def revert(self) -> None:
        """Put W back, bit for bit, where it holds W + S."""
        if self._written is None:
            return
        # not while another thread multiplies by it
        with WRITING:
            written = self._written
            if written is not None:
                weight = self.stored_weight.data
                # the weight may have been cast by itself
                restore_(weight, written.mask, written.originals.to(weight.dtype), self.transposed)
                self.__dict__["_written"] = None

    def _fresh_weight(self) -> Tensor:
        """A new tensor with W, in the layout of storage."""
        base_layer = self.get_base_layer()
        with self.brought_in():
            if self.quantization_backend is not None:
                weight = dequantize_4bit(getattr(base_layer, "weight", None))
                return self.quantization_backend.get_base_weight(base_layer) if weight is None else weight
            return self.stored_weight.detach().clone(memory_format=torch.contiguous_format)

    def _fresh_sum(self, values: Tensor, mask: Mask, originals: Tensor | None = None) -> Tensor:
        """A new tensor with W + S, in the layout of storage."""
        weight = self._fresh_weight()
        if originals is None:
            add_at_(weight, mask, values.detach(), self.transposed)
        else:
            assign_sum_(weight, mask, originals, values.detach(), self.transposed)
        return weight

    def _sum_before_merges(self, values: Tensor, mask: Mask) -> Tensor:
        """W plus one delta for the backward pass of a forward pass from before a merge, in the layout of storage."""
        weight = self._fresh_weight()
        for undo in reversed(self._undo_merge):
            if not isinstance(undo, Replaced):
                assign_reversed(weight.view(-1), undo)
            elif self.quantization_backend is None:
                weight = undo.parameters[self.parameter_name].detach().clone(memory_format=torch.contiguous_format)
            else:
                raise SpftError(
                    "an adapter of a quantized layer was merged between a forward pass and its backward pass: merge "
                    "after backward()"
                )
        add_at_(weight, mask, values.detach(), self.transposed)
        return weight


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


def assign_reversed(flat: Tensor, entries: list[tuple[Tensor, Tensor]]) -> None:
    """Put back what stood at entries (positions, values) of a flat tensor, the last ones first."""
    for at, before in reversed(entries):
        flat[at.to(flat.device)] = before.to(flat)


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or tensor.data_ptr() == other.data_ptr()
