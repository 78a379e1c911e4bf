"""What every sparse layer has: adapters' values and masks, merging; the forward pass is its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.linear import owner_of, register_owner
from axolotl_spft.ops.mask.csr import Mask, empty_mask
from axolotl_spft.ops.reference import dense_delta
from axolotl_spft.tuner.called import CalledLayer
from axolotl_spft.tuner.deltas import Deltas, MadeDelta
from axolotl_spft.tuner.held_values import hold_values, note_deletion
from axolotl_spft.tuner.layer_state import LayerState
from axolotl_spft.tuner.merged_weight import MergedWeight
from axolotl_spft.tuner.offloading import execution_device, keep_resident, kept_quant_state, tensor_in
from axolotl_spft.tuner.without_mask import refuse_layer_without_mask

if TYPE_CHECKING:
    from axolotl_spft.tuner.tied import TiedLayer


class SparseLayer(LayerState, CalledLayer, Deltas, MergedWeight):
    """A frozen W (out_features, in_features) and one sparse S of the same shape per adapter.

    A kind of layer adds its first adapter at the end of its ``__init__`` and has the forward pass.

    For each adapter: ``spft_values`` (nnz; the trained parameter), and the CSR mask in ``spft_columns`` (nnz; uint16
    or int32) and ``spft_row_offsets`` (out_features + 1; int32). A new adapter is empty. One that repairs a quantized
    W has ``spft_originals`` (nnz), the entries before quantization, which take the place of W's own under its values.

    Args:
        base_layer: the module that holds W.
        adapter_name: of the first adapter.
        shape: (out_features, in_features) of W.
        transposed: whether W is stored as (in_features, out_features).
        quantization_backend: PEFT's, of a quantized base layer.

    Attributes:
        readers: layers of other modules that hold the same W, which compute with this one's S.
        mixes_rows: whether the forward pass takes ``adapter_names``, an adapter for each row of a batch.
        writes_ahead: whether a `Writer` may write for it.
        unrecorded: adapters whose mask is another one than the model has recorded.
    """

    adapter_layer_names = ("spft_values",)
    other_param_names = ("spft_columns", "spft_row_offsets", "spft_originals")
    readers: tuple[TiedLayer, ...] = ()
    mixes_rows = False
    writes_ahead = True
    unrecorded: frozenset[str] = frozenset()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        shape: tuple[int, int],
        transposed: bool = False,
        quantization_backend: QuantizationBackend | None = None,
    ):
        super().__init__()
        self._hold_base_layer(base_layer)
        self.quantization_backend = quantization_backend
        self._quant_state = kept_quant_state(self.get_base_layer())
        self.transposed = transposed
        self.out_features, self.in_features = shape
        self.spft_values = nn.ParameterDict()
        self.spft_columns = BufferDict(persistent=True)
        self.spft_row_offsets = BufferDict(persistent=True)
        self.spft_originals = BufferDict(persistent=True)
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._undo_merge = []
        self._deltas = {}
        self._owner = register_owner(self)

    def _hold_base_layer(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling: a copy holds W, and is written by nothing that writes for this layer
        self.revert()
        # pickling for another process moves the weight into memory that both have
        self._in_place = None
        return {**self.__dict__, "_writer": None}

    def __setstate__(self, state: dict) -> None:
        # a copy owns its weight under a number of its own
        super().__setstate__(state)
        self._owner = register_owner(self)

    def _apply(self, fn, recurse=True):
        # moving or casting must see W itself, and what was worked out for the old device is void
        self.revert()
        self._forget_derived()
        return super()._apply(fn, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would cast the mask to the weight's dtype
        if adapter_name in self.spft_values:
            values = self.values(adapter_name)
            device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
            self.spft_values[adapter_name] = nn.Parameter(values.data.to(device), requires_grad=values.requires_grad)
            self.spft_columns[adapter_name], self.spft_row_offsets[adapter_name] = (
                tensor.to(device) for tensor in self.mask(adapter_name)
            )
            if adapter_name in self.spft_originals:
                self.spft_originals[adapter_name] = self.originals(adapter_name).to(device)
            self._forget_derived()

    def _replicate_for_data_parallel(self):
        raise SpftError(
            "torch.nn.DataParallel copies layers without their weights' bookkeeping and is not supported: "
            "start one process per GPU with `accelerate launch` or `torchrun`"
        )

    def _forget_derived(self) -> None:
        """Forget what was worked out from the masks and from where the tensors lie; called whenever one changes."""
        self._in_place = None
        # of the active adapters: where their values stand, and for several where each one's go in the union
        self._deltas: dict[tuple[str, ...], MadeDelta] = {}
        for reader in self.readers:
            reader.forget()

    # --- adapters

    def add_empty_adapter(self, adapter_name: str) -> None:
        """Add an adapter without entries."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        self.set_mask(
            adapter_name, empty_mask(self.out_features, self.in_features), torch.empty(0, device=device, dtype=dtype)
        )
        self.set_adapter(self.active_adapters)

    def mask(self, adapter_name: str) -> Mask:
        """The CSR mask of an adapter."""
        return Mask(*(tensor_in(part, adapter_name) for part in (self.spft_columns, self.spft_row_offsets)))

    def values(self, adapter_name: str) -> Tensor:
        """The values of an adapter: (nnz)."""
        return tensor_in(self._modules["spft_values"], adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return execution_device(base_layer) or device, dtype

    def set_mask(
        self, adapter_name: str, mask: Mask, values: Tensor | None = None, originals: Tensor | None = None
    ) -> None:
        """Give an adapter new positions, with the given values (nnz) or zeros; see `hold_values`.

        ``originals`` (nnz) are what a quantized weight was at these positions, for an adapter that repairs it.

        Raises:
            SpftError: the values are not as many as the mask's entries, or the adapter cannot have another mask now.
        """
        if values is not None and values.numel() != mask.nnz:
            raise SpftError(f"adapter `{adapter_name}`: {values.numel()} values for a mask of {mask.nnz}: give as many")
        if self.merged:
            raise SpftError("the mask cannot change while an adapter is merged: call unmerge_adapter() first")
        self.refuse_to_forget_originals(adapter_name, originals)
        self.revert()
        for part in (self.spft_values, self.spft_columns, self.spft_row_offsets, self.spft_originals):
            keep_resident(part)
        old = self.spft_values.get(adapter_name)
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = torch.zeros(mask.nnz, dtype=old.dtype) if values is None else values
        hold_values(self, adapter_name, values.to(device))
        mask = Mask(*(tensor.to(device) for tensor in mask))
        self.spft_columns[adapter_name], self.spft_row_offsets[adapter_name] = mask
        self.set_originals(adapter_name, originals)
        self.unrecorded |= {adapter_name}

    def add_up(
        self,
        adapter_name: str,
        weights: Sequence[tuple[str, float]],
        combine: Callable[[list[Tensor], Tensor], Tensor],
    ) -> None:
        """Make an adapter's S a combination of other adapters' S, on the positions of all of them.

        Args:
            weights: the other adapters, and the weight of each.
            combine: makes the combination's values (n) of each adapter's values (n), float32, and their weights.
        """
        given = [(name, weight) for name, weight in weights if name in self.spft_values]
        names = tuple(dict.fromkeys(name for name, _ in given))
        mask, union_places = self._union(names)
        places, each = dict(zip(names, union_places)), []
        for name, _ in given:
            values = self.values(name).detach().to(torch.float32)
            each.append(values.new_zeros(mask.nnz).index_add_(0, places[name], values))
        total = combine(each, torch.tensor([weight for _, weight in given], device=mask.columns.device))
        originals = self._union_originals(names, mask, union_places)
        self.set_mask(adapter_name, mask, total.to(self.spft_values[names[0]].dtype), originals)

    def retire_empty_values(self) -> None:
        """Make the values of adapters without entries buffers, which nothing trains."""
        for adapter_name, values in self.spft_values.items():
            if isinstance(values, nn.Parameter) and not self.mask(adapter_name).nnz:
                delattr(self.spft_values, adapter_name)
                self.spft_values.register_buffer(adapter_name, values.detach())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # as PEFT's, past torch's look-ups and assignments: hundreds of layers do this when an adapter is chosen
        self.revert()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, values in self._modules["spft_values"]._parameters.items():
            trained = name in names and not inference_mode
            if values.requires_grad != trained and values.is_leaf:
                values.requires_grad_(trained)
        self.__dict__["_active_adapter"] = names

    def enable_adapters(self, enabled: bool) -> None:
        self.revert()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.refuse_if_merged(adapter_name)
        note_deletion(self, adapter_name)
        self.revert()
        self._forget_derived()
        super().delete_adapter(adapter_name)

    def get_base_weight(self) -> Tensor:
        return self.read_weight()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """S of an adapter as a dense matrix: (out_features, in_features); of one that repairs W, what it adds to W."""
        values = self.values_added(adapter_name).detach()
        return dense_delta(values, self.mask(adapter_name), self.in_features)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # S is sparse, not of low rank

    # --- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the (active) adapters' deltas to the base layer's weight.

        Raises:
            ValueError: ``safe_merge`` and the sum holds a NaN or an infinity; nothing is changed then.
            SpftError: one of them would replace entries that hold an adapter which was merged before.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.spft_values]
        deltas = {name: self._part(name) for name in names if self.mask(name).nnz}
        self.refuse_to_replace_merged(deltas)
        if deltas:
            self.merge_deltas(deltas, check_finite=safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base layer's weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_deltas()
        self.merged_adapters.clear()

    # --- for the forward pass

    def get_base_layer(self) -> nn.Module:
        # as PEFT's, without the failing look-ups on the innermost layer: this runs in every forward and backward
        base_layer = self._modules["base_layer"]
        return base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer

    def has_values(self, adapter_name: str) -> bool:
        """Whether the layer has an adapter of this name that has entries."""
        columns = self._modules["spft_columns"]._buffers
        return adapter_name in columns and columns[adapter_name].numel() > 0

    def _filled_active_adapters(self) -> tuple[str, ...]:
        # by the mask: values that ZeRO-3 has partitioned have no entries of their own
        columns, active = self._modules["spft_columns"]._buffers, self._active_adapter
        names = (active,) if isinstance(active, str) else active
        return tuple([name for name in names if name in columns and columns[name].numel()])

    def adapters_to_apply(self) -> tuple[str, ...]:
        """The adapters whose S belongs to the weight in a forward pass that begins now.

        Raises:
            SpftError: the pass is about to train an adapter that has no mask in any layer of the model.
        """
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return ()
        if self.merged_adapters:
            return ()
        names = self._filled_active_adapters()
        if not names:
            refuse_layer_without_mask(self)
        return names

    def reads_weight_again(self, x: Tensor) -> bool:
        """Whether the backward pass of the base layer would read its weight, at a time when that may hold W + S.

        Args:
            x: what the base layer is to multiply.
        """
        if not x.requires_grad or not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():
            # the graph stays when masks come and go
            return is_plain(self._owner)
        # a layer with S takes part in none of functorch's transforms
        if torch._C._are_functorch_transforms_active():
            return False
        return self.in_place and any(map(self.has_values, self.spft_columns))

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {values.numel()}" for name, values in self.spft_values.items())
        return ", ".join(filter(None, [quantization_extra_repr(self), f"nnz={{{counts}}}"]))

    def __repr__(self) -> str:
        return "spft." + super().__repr__()


@torch.compiler.assume_constant_result
def is_plain(owner: int) -> bool:
    """Whether the weight of a sparse layer is of the kind that holds W + S itself while an adapter computes."""
    return owner_of(owner).is_plain
