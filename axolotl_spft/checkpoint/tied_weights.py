"""Which tensors of a base checkpoint get the deltas of an adapter, where the model ties weights to each other."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from axolotl_spft.checkpoint.adapter import SavedAdapter
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.errors import SpftFileError
from axolotl_spft.tuner.tied import no_longer_tied


class Places(NamedTuple):
    """Where deltas go.

    Attributes:
        stored: parameter that the checkpoint has -> the module whose delta it gets.
        apart: parameter that the checkpoint has no tensor of, as it is tied to another one from which it parts now ->
            the module whose delta it gets, or None where it stays as it is.
        unties: whether weights part that were tied.
    """

    stored: dict[str, str]
    apart: dict[str, str | None]
    unties: bool


def place_deltas(base: BaseCheckpoint, adapter: SavedAdapter) -> Places:
    """Where each delta of an adapter goes: to all that was one weight in training, and to nothing else.

    Of an older file, which does not record that, the delta of an embedding is of all that is tied to it here, unless it
    has a delta of its own, and that of a head of the head alone.

    Raises:
        SpftFileError: what was one weight in training is several in the base.
    """
    keys, recorded = base.keys, adapter.record.get("tied")
    known = keys.group_of.keys() | keys.tied.keys()
    own_of = {
        module: next((name for name in (f"{module}.weight", module) if name in known), base.parameter(module))
        for module in adapter.deltas
    }

    @cache
    def are_equal(pair: frozenset[str]) -> bool:
        """Of two tensors that the checkpoint has: a model ties them where they are. Each pair is read once."""
        return torch.equal(*map(base.read_parameter, pair))

    stored: dict[str, str] = {}
    apart: dict[str, str | None] = {}
    for module, own in own_of.items():
        parameter = base.parameter(module)
        here = {parameter, *(name for name, other in keys.tied.items() if other == parameter)}
        here |= {other for name, other in keys.doubled if name == parameter and are_equal(frozenset((name, other)))}
        if recorded is not None:
            trained = {own, *(f"{name}.weight" for name in recorded.get(module, ()))} & known
        elif module in base.embeddings:
            trained = here - (set(own_of.values()) - {own})
        else:
            trained = {own}
        if trained - here:
            names = (name.removesuffix(".weight") for name in trained)
            raise SpftFileError(no_longer_tied(names, str(base.shards.folder)))
        if parameter in trained:
            stored |= dict.fromkeys(trained & keys.group_of.keys(), module)
            for name in here - trained - keys.group_of.keys():
                apart.setdefault(name, None)
        else:
            apart |= dict.fromkeys(trained, module)
    parted = any(
        stored.get(one) != stored.get(other) and are_equal(frozenset((one, other))) for one, other in keys.doubled
    )
    return Places(stored, apart, bool(apart) or parted)
