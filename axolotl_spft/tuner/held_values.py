"""The parameter that holds an adapter's values in a layer, when the mask under it changes."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import count_of, is_partitioned, overwrite
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import slot_of
from axolotl_spft.optim.mask_changes import Slot, note_change, note_replacement

# by layer and adapter: values that an optimizer may hold still when an adapter of the same name takes their place
_deleted: weakref.WeakKeyDictionary[nn.Module, dict[str, TensorWeakRef]] = weakref.WeakKeyDictionary()


def note_deletion(layer: nn.Module, adapter_name: str) -> None:
    """Say that an adapter is about to be deleted: with another one of its name an optimizer would train nothing."""
    values = layer.spft_values.get(adapter_name)
    if isinstance(values, nn.Parameter) and values.numel():
        _deleted.setdefault(layer, {})[adapter_name] = TensorWeakRef(values)


def hold_values(layer: nn.Module, adapter_name: str, values: Tensor) -> None:
    """Let the adapter's parameter hold other values, which stand for other positions.

    It stays the same object where it was empty or has as many values, so that an optimizer that was made before trains
    it; any other is replaced, and an optimizer that holds the old one refuses its next step. So does one that holds the
    values of a deleted adapter of the same name.

    Args:
        layer: the sparse layer.
        values: (nnz), on the device where they belong.

    Raises:
        SpftError: DeepSpeed's engine holds the parameter and has another count of values for it.
    """
    parameters = layer.spft_values
    old = parameters.get(adapter_name)
    gone = _deleted.get(layer, {}).pop(adapter_name, None)
    if gone is not None and gone() is not None:
        note_replacement(gone(), adapter_name)
    if not isinstance(old, nn.Parameter):
        # the adapter is new, or its empty values were retired: nothing says yet whether they are trained
        parameters[adapter_name] = nn.Parameter(values, requires_grad=adapter_name in layer.active_adapters)
        return
    same_count = count_of(old) == values.numel()
    if not same_count and (is_partitioned(old) or hasattr(old, "_hp_mapping")):
        raise SpftError(
            f"the mask of adapter `{adapter_name}` has {values.numel()} values in a layer where DeepSpeed's engine "
            f"holds {count_of(old)}: select or load it before the engine is made"
        )
    if is_partitioned(old):
        # wherever its parts lie
        overwrite(old, values.to(old.dtype), Ranks.current().rank)
        old.grad = None
        note_change(old, partial(_slot, weakref.ref(layer), adapter_name))
        return
    alike = (old.device, old.dtype) == (values.device, values.dtype) and not old.is_inference()
    if alike and (same_count or not old.numel()):
        _hold(old, values)
        note_change(old, partial(_slot, weakref.ref(layer), adapter_name))
        return
    parameters[adapter_name] = nn.Parameter(values, requires_grad=old.requires_grad)
    if old.numel():
        note_replacement(old, adapter_name)


def _slot(layer: weakref.ref[nn.Module], adapter_name: str) -> Slot | None:
    owner = layer()
    return slot_of(owner.mask(adapter_name)) if owner is not None and adapter_name in owner.spft_columns else None


@torch.no_grad()
def _hold(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.grad = None
    if parameter.numel() != values.numel():
        parameter.data = torch.empty_like(values)
    # not by .data: autograd has to see the change
    parameter.copy_(values)
