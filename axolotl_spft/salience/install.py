"""Gives the sparse layers of a model their masks, and checks that all ranks hold the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.optim.mask_changes import Slot
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import mask_checksum, slots_of, spft_layers


def adapted_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a `PeftModel`, by their names in the base model."""
    return spft_layers(model.base_model.model)


def install_masks(
    model: nn.Module,
    adapter_name: str,
    masks: Mapping[str, Mask],
    source: Mapping,
    originals: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the adapter these masks with values of 0, and record them in its config.

    ``originals`` are what the weights that are repaired were at the entries of their masks: (nnz) by name.
    """
    layers, originals = adapted_layers(model), originals or {}
    for name, mask in masks.items():
        layers[name].set_mask(adapter_name, mask, originals=originals.get(name) if mask.nnz else None)
    record_mask(model.base_model, adapter_name, source)
    retire_empty_values(model)


def retire_empty_values(model: nn.Module) -> None:
    """Let no parameter be without entries: DDP would wait for it, DeepSpeed can neither flatten nor gather it."""
    for layer in adapted_layers(model).values():
        layer.retire_empty_values()


def check_same_mask(model: nn.Module, ranks: Ranks, adapter_name: str | None = None) -> str:
    """Check that all ranks hold the same mask, and return its checksum, as `check_same_slots` does."""
    return check_same_slots(slots_of(adapted_layers(model), adapter_name or model.active_adapter), ranks)


def check_same_slots(slots: Mapping[str, Slot], ranks: Ranks) -> str:
    """Check that all ranks hold the same mask.

    Args:
        slots: of the mask, from `slots_of`.

    Returns:
        Its checksum, of `mask_checksum`.

    Raises:
        SpftError: on every rank, when one differs.
    """
    checksum = mask_checksum(slots)
    mine = torch.tensor([int(checksum[start : start + 8], 16) for start in range(0, 64, 8)])
    if (ranks.gather_numbers(mine) != mine).any():
        raise SpftError(
            f"the ranks hold different masks (rank {ranks.rank}: {checksum[:16]}): read the same files on every node, "
            "and the same model and seed"
        )
    return checksum
