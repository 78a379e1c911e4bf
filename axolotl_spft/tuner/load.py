"""What a state dict brings of an adapter: its mask is installed, and what is recorded is what is installed."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from axolotl_spft.config import RECORDED, mask_option_names
from axolotl_spft.engine.zero3 import is_partitioned
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.tuner.biases import take_biases
from axolotl_spft.tuner.record import NAME, make_record, record_from_tensor, record_to_tensor
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import TENSORS, base_shapes_of, check_state, shapes_of, spft_layers
from axolotl_spft.tuner.tied import check_ties, tied_names
from axolotl_spft.tuner.trained_on import trained_on


def record_mask(
    tuner: nn.Module, adapter_name: str, source: Mapping | None, base: Mapping[str, Any] | None = None
) -> None:
    """Record the mask that an adapter holds now, in its config and in the tensor that its file will carry.

    Args:
        tuner: the `SpftModel`.
        source: salience, scope, samples read and seed that made it; None where nothing is known of it.
        base: what its values were trained on, by default this model; empty where it is not known.
    """
    layers, config = _layers_of(tuner, adapter_name), tuner.peft_config[adapter_name]
    config.nnz = sum(layer.mask(adapter_name).nnz for layer in layers.values())
    config.base_shapes = base_shapes_of(layers)
    config.mask_source = None if source is None else dict(source)
    config.awaited = None
    tied = {name: others for name, others in tied_names(tuner.model).items() if name in layers}
    base = trained_on(tuner.model, adapter_name) if base is None else base
    record = record_to_tensor(make_record(config, shapes_of(layers), source, tied, base))
    device = next((layer.spft_columns[adapter_name].device for layer in layers.values()), None)
    tuner.spft_record[adapter_name] = record.to(device)
    for layer in layers.values():
        layer.unrecorded -= {adapter_name}


def record_given_masks(tuner: nn.Module) -> None:
    """Record anew the masks that layers were given past the `SpftModel`: by a state dict of the model inside, say.

    Where they come from is not known, nor, of an adapter that is only read, what its values were trained on.
    """
    for adapter_name in _given(tuner):
        only_read = tuner.peft_config[adapter_name].inference_mode
        record_mask(tuner, adapter_name, None, {} if only_read else None)


def forget_counts(tuner: nn.Module) -> None:
    """Forget how many values the masks had before such ones were given: of a state dict that comes it says nothing."""
    for adapter_name in _given(tuner):
        tuner.peft_config[adapter_name].nnz = None


def _given(tuner: nn.Module) -> list[str]:
    """The adapters with a mask that is not the recorded one; an empty one awaits its mask, and is none."""
    found = []
    for adapter_name in tuner.peft_config:
        # a mixed model has adapters of other methods
        layers = _layers_of(tuner, adapter_name).values()
        is_new = any(adapter_name in layer.unrecorded for layer in layers)
        if is_new and any(layer.mask(adapter_name).nnz for layer in layers):
            found.append(adapter_name)
    return found


def recorded_base(tuner: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What is recorded of the base that an adapter's values were trained on; empty where nothing is."""
    record = record_from_tensor(tuner.spft_record[adapter_name]) if adapter_name in tuner.spft_record else {}
    return record.get("trained_on", {})


def take_state(tuner: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, assign: bool) -> None:
    """Install the masks that ``state_dict`` brings, so that its values fit; torch then copies the values.

    Args:
        tuner: the `SpftModel`.
        prefix: what its keys begin with.
        assign: whether torch will put tensors of the dict in the places of the model's parameters.

    Raises:
        SpftFileError: anything does not fit. An adapter that was just made for this file is removed again.
    """
    for adapter_name in list(tuner.peft_config):
        ending = f".spft_values.{adapter_name}"
        if any(key.startswith(prefix) and key.endswith(ending) for key in state_dict):
            _take_adapter(tuner, adapter_name, state_dict, prefix, assign)


def _take_adapter(
    tuner: nn.Module, adapter_name: str, state_dict: MutableMapping[str, Tensor], prefix: str, assign: bool
) -> None:
    layers, config = _layers_of(tuner, adapter_name), tuner.peft_config[adapter_name]
    base, record_key = f"{prefix}model.", f"{prefix}{NAME}.{adapter_name}"
    if any(is_partitioned(layer.spft_values[adapter_name]) for layer in layers.values()):
        # DeepSpeed's own checkpoint: it restores the values of each rank's part and holds none of them here
        _check_same_masks(layers, state_dict, base, adapter_name)
        _keep_own_record(tuner, adapter_name, state_dict, record_key)
        return
    held = sum(layer.mask(adapter_name).nnz for layer in layers.values())
    expected = config.awaited or {name: getattr(config, name) for name in RECORDED}
    try:
        record = _given_record(state_dict, record_key)
        renamed = bool(getattr(tuner.model, "_checkpoint_conversion_mapping", None))
        shapes = (record or {}).get("shapes") or None
        repaired = ((record or {}).get("mask_source") or {}).get("repaired")
        recorded = (expected["nnz"], expected["base_shapes"], shapes, renamed, repaired)
        ending = f".{TENSORS[0]}.{adapter_name}"
        deltas = [
            key.removeprefix(base).removesuffix(ending)
            for key in state_dict
            if key.startswith(base) and key.endswith(ending)
        ]
        check_ties(tuner.model, deltas, (record or {}).get("tied"), adapter_name)
        check_state(state_dict, layers, base, adapter_name, *recorded)
        take_biases(tuner, state_dict, prefix, adapter_name)
    except SpftFileError:
        if not held:
            _remove(tuner, adapter_name)
        raise
    changed = [layer.take_mask(adapter_name, state_dict, f"{base}{name}.") for name, layer in layers.items()]
    source = expected["mask_source"]
    if record is not None and "mask_source" in record:
        source = record["mask_source"]
        options = record.get("options", {})
        for name in set(mask_option_names()) & set(options):
            setattr(config, name, options[name])
    elif held and any(changed):
        # an older file, which says nothing of its mask, over an adapter whose mask came from elsewhere
        source = None
    if any(layer.mask(adapter_name).nnz for layer in layers.values()):
        # an adapter that is only read may have been trained on another base
        base_of_file = (record or {}).get("trained_on", {})
        record_mask(tuner, adapter_name, source, base_of_file if config.inference_mode else None)
    _keep_own_record(tuner, adapter_name, state_dict, record_key)


def _layers_of(tuner: nn.Module, adapter_name: str) -> dict[str, SparseLayer]:
    return {name: layer for name, layer in spft_layers(tuner.model).items() if adapter_name in layer.spft_values}


def _given_record(state_dict: Mapping[str, Tensor], record_key: str) -> dict[str, Any] | None:
    return record_from_tensor(state_dict[record_key]) if record_key in state_dict else None


def _keep_own_record(
    tuner: nn.Module, adapter_name: str, state_dict: MutableMapping[str, Tensor], record_key: str
) -> None:
    """Give torch, which copies what the dict holds, the record of the model, whose length may be another."""
    if adapter_name in tuner.spft_record:
        state_dict[record_key] = tuner.spft_record[adapter_name]
    else:
        state_dict.pop(record_key, None)


def _check_same_masks(
    layers: Mapping[str, SparseLayer], state_dict: Mapping[str, Tensor], base: str, adapter_name: str
) -> None:
    for name, layer in layers.items():
        for tensor, own in zip(("spft_columns", "spft_row_offsets"), layer.mask(adapter_name)):
            given = state_dict.get(f"{base}{name}.{tensor}.{adapter_name}", own)
            if not torch.equal(given.to("cpu", torch.int64), own.to("cpu", torch.int64)):
                raise SpftError(
                    f"the checkpoint holds another mask of adapter `{adapter_name}` than this run ({name} differs), "
                    "and DeepSpeed's engine is made already: load the checkpoint's adapter before the engine is made"
                )


def _remove(tuner: nn.Module, adapter_name: str) -> None:
    tuner.delete_adapter(adapter_name)
    if tuner.peft_config:
        return
    for module in list(tuner.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AuxiliaryTrainingWrapper):
                # PEFT's own unloading would put the deleted adapter's copy in its place
                setattr(module, name, child.original_module)
    tuner.unload()
