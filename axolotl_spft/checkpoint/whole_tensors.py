"""What a sum of adapters holds beside its deltas: tensors that are the same in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import UNDER_DELTA, SavedAdapter
from axolotl_spft.errors import SpftFileError, listed


def common_tensors(adapters: Sequence[SavedAdapter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The others and the biases (see `SavedAdapter`) of an adapter that is made of all of these.

    A tensor has to be equal bit for bit in all adapters that hold it. One that was trained whole has to be in all of
    them, since the rest ran with the base's. An embedding or a head that has grown, which PEFT saves untrained, need
    not, as long as every delta on it is for as many rows.

    Raises:
        SpftFileError: there are other tensors; the message names them.
    """
    if len(adapters) == 1:
        return adapters[0].others, adapters[0].biases
    held = [{name.replace(UNDER_DELTA, "."): each for name, each in a.others.items()} | a.biases for a in adapters]
    found: dict[str, Tensor] = {}
    refused = []
    for name in dict.fromkeys(name for tensors in held for name in tensors):
        given = [tensors[name] for tensors in held if name in tensors]
        module = name.rpartition(".")[0]
        rows = {a.deltas[module].shape[0] for a in adapters if module in a.deltas and name == f"{module}.weight"}
        incomplete = len(given) < len(adapters) and any(_is_trained(name, adapter) for adapter in adapters)
        if incomplete or not all(_same(given[0], each) for each in given[1:]) or rows - {len(given[0])}:
            refused.append(name)
        found[name] = given[0]
    if refused:
        raise SpftFileError(
            f"{listed(refused)}: not the same in all of the adapters. What was trained whole (`modules_to_save`, "
            "`bias: all`) or has grown with new tokens is no difference and cannot be added up: merge one of the "
            "adapters into the base model instead"
        )
    of_biases = {name for adapter in adapters for name in adapter.biases}
    under_delta = {f"{module}.weight": f"{module}{UNDER_DELTA}weight" for a in adapters for module in a.deltas}
    others = {under_delta.get(name, name): each for name, each in found.items() if name not in of_biases}
    return others, {name: found[name] for name in of_biases}


def modules_to_save(configs: Sequence[Mapping]) -> list[str]:
    """The modules that are trained whole in any adapter of these configs."""
    return list(dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or ()))


def _is_trained(name: str, adapter: SavedAdapter) -> bool:
    saved = adapter.config.get("modules_to_save") or ()
    return name in adapter.biases or any(f".{each}." in f".{name}" for each in saved)


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))
