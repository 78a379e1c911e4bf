"""Where a matrix sits in its model: the layer, and the type of module that repeats from layer to layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# of matrices outside the numbered layers, such as the head
OUTSIDE = "-"


class Place(NamedTuple):
    """The layer's label and the module's type: ``model.layers.3.mlp.up_proj`` is in layer ``3`` of type ``up_proj``."""

    layer: str
    kind: str


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of each matrix, in the order of ``names``.

    A layer is the first number in a name. Where a model has several stacks of layers, such as an encoder and a
    decoder, the label begins with what tells the stacks apart. A type is the last part of a name; where it stands for
    different modules (GPT-2's ``attn.c_proj`` and ``mlp.c_proj``), all parts below the layer without their numbers.
    """
    split = {name: _split(name) for name in names}
    stacks = list(dict.fromkeys(stack for stack, number, _ in split.values() if number is not None))
    common = 0
    if len(stacks) > 1:
        while len({stack[: common + 1] for stack in stacks}) == 1:
            common += 1
    paths: dict[str, set[tuple[str, ...]]] = {}
    for _, _, path in split.values():
        paths.setdefault(path[-1], set()).add(path)
    places = {}
    for name, (stack, number, path) in split.items():
        label = [".".join(stack[common:])] if len(stacks) > 1 else []
        layer = OUTSIDE if number is None else " ".join([*label, str(number)])
        places[name] = Place(layer, path[-1] if len(paths[path[-1]]) == 1 else ".".join(path))
    return places


def layers_in_order(places: Iterable[Place]) -> list[str]:
    """The labels of all layers, each stack by number, what is outside them last."""
    labels = list(dict.fromkeys(place.layer for place in places))
    stacks = list(dict.fromkeys(label.rpartition(" ")[0] for label in labels))

    def key(label: str) -> tuple[bool, int, int]:
        stack, _, number = label.rpartition(" ")
        return label == OUTSIDE, stacks.index(stack), 0 if label == OUTSIDE else int(number)

    return sorted(labels, key=key)


def _split(name: str) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """The stack of layers, the layer's number, and the path below it without numbers (never empty)."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    below = parts if first is None else parts[first + 1 :]
    path = tuple(part for part in below if not part.isdigit()) or (below[-1],)
    return tuple(parts[:first] if first is not None else ()), int(parts[first]) if first is not None else None, path
