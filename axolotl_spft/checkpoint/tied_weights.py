"""Which tensors of a base checkpoint get what an adapter has trained, where the model ties weights to each other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import SavedAdapter
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.errors import SpftFileError
from axolotl_spft.tuner.tied import no_longer_tied

# the module whose delta a parameter gets, the tensor that takes its place, or nothing: it stays as it is
Source: TypeAlias = str | Tensor | None


class Places(NamedTuple):
    """Where goes what was trained.

    Attributes:
        deltas: parameter that the checkpoint has -> the module whose delta it gets.
        whole: parameter that the checkpoint has -> the tensor that takes its place.
        apart: parameter that the checkpoint has no tensor of, as it is tied to another one from which it parts now ->
            what it gets.
        new: parameter that neither the checkpoint has nor the model ties, such as a classifier's -> its tensor.
        unties: whether weights part that were tied.
    """

    deltas: dict[str, str]
    whole: dict[str, Tensor]
    apart: dict[str, Source]
    new: dict[str, Tensor]
    unties: bool


def place(base: BaseCheckpoint, adapter: SavedAdapter) -> Places:
    """Where everything that an adapter holds goes: to all that was one weight in training, and to nothing else.

    PEFT trains a module of ``modules_to_save`` as a copy, so its weight parts from what the base ties it to. Biases are
    trained in place, and so is a weight that gets a delta. Of an older file, which does not record what that weight was
    one with, the delta of an embedding is of all that is tied to it here, unless it was trained itself, and that of a
    head of the head alone.

    Raises:
        SpftFileError: what was one weight in training is several in the base; or one of two weights that the base ties
            has another shape now, and the adapter does not hold the other.
    """
    keys = base.keys
    known = keys.group_of.keys() | keys.tied.keys()

    @cache
    def are_equal(pair: frozenset[str]) -> bool:
        """Of two tensors that the checkpoint has: a model ties them where they are. Each pair is read once."""
        return torch.equal(*map(base.read_parameter, pair))

    def one_weight(parameter: str) -> set[str]:
        """All that the base has as one weight with a parameter that the checkpoint has."""
        here = {parameter, *(name for name, other in keys.tied.items() if other == parameter)}
        return here | {
            other for name, other in keys.doubled if name == parameter and are_equal(frozenset((name, other)))
        }

    whole = adapter.whole.keys() - adapter.biases.keys()
    sources: dict[str, Source] = {name: adapter.others[name] for name in whole & known}
    for name in adapter.biases.keys() & known:
        sources |= dict.fromkeys(one_weight(keys.tied.get(name, name)), adapter.biases[name])
    recorded = adapter.record.get("tied")
    own_of = {
        module: next((name for name in (f"{module}.weight", module) if name in known), base.parameter(module))
        for module in adapter.deltas
    }
    for module, own in own_of.items():
        here = one_weight(base.parameter(module))
        if recorded is not None:
            trained = {own, *(f"{name}.weight" for name in recorded.get(module, ()))} & known
        elif module in base.embeddings:
            trained = here - (set(own_of.values()) - {own}) - whole
        else:
            trained = {own}
        if trained - here:
            names = (name.removesuffix(".weight") for name in trained)
            raise SpftFileError(no_longer_tied(names, str(base.shards.folder)))
        sources |= dict.fromkeys(trained, module)
    apart = {name: sources.get(name) for name, other in keys.tied.items() if _differ(sources, name, other)}
    parted = [pair for pair in keys.doubled if _differ(sources, *pair) and are_equal(frozenset(pair))]
    for pair in [*((name, keys.tied[name]) for name in apart), *parted]:
        _check_shapes(base, sources, pair)
    stored = {name: source for name, source in sources.items() if name in keys.group_of}
    return Places(
        {name: source for name, source in stored.items() if isinstance(source, str)},
        {name: source for name, source in stored.items() if isinstance(source, Tensor)},
        apart,
        {name: tensor for name, tensor in adapter.whole.items() if name not in known},
        bool(apart or parted),
    )


def _differ(sources: Mapping[str, Source], name: str, other: str) -> bool:
    one, two = sources.get(name), sources.get(other)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape != two.shape or not torch.equal(one, two)
    return one is not two


def _check_shapes(base: BaseCheckpoint, sources: Mapping[str, Source], pair: tuple[str, str]) -> None:
    (key, *_) = base.keys.group_of[pair[1]].keys
    stored = base.shards.shape(key)
    for name, other in (pair, pair[::-1]):
        source = sources.get(name)
        if isinstance(source, Tensor) and tuple(source.shape) != stored and sources.get(other) is None:
            raise SpftFileError(
                f"{name} has {tuple(source.shape)} in the adapter, and {other}, which {base.shards.folder} ties to it, "
                f"has {stored} and is not in the adapter: train with both in `modules_to_save`"
            )
