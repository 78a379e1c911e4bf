"""Where the weight of a saved adapter's module lies in a serving engine's model.

Engines fuse the projections that read the same input, rows under rows, and divide matrices among the ranks of tensor
parallelism: by rows (column-parallel, as engines call it for y = x W^T), or by columns (o_proj, down_proj).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.tied import no_longer_tied

# name of a fused module: of its parts, in the order of its rows
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PART_OF = {part: fused for fused, parts in FUSED.items() for part in parts}

Shapes = Mapping[str, tuple[int, int]]


class Place(NamedTuple):
    """A part of a weight that holds a part of a module's W.

    Attributes:
        weight: (rows, columns), the whole parameter.
        first_row: of the module in ``weight``.
        rows, columns: those of W that lie there.
    """

    weight: Tensor
    first_row: int
    rows: range
    columns: range


def find_place(
    modules: Mapping[str, nn.Module], name: str, shapes: Shapes, rank: int = 0, ranks: int = 1, exact: bool = True
) -> Place | None:
    """The place of the module ``name``, or None where the model has no such module.

    Args:
        modules: of a model, by name; the names may have a prefix that the adapter's have not, or lack one.
        name: of a module of the adapter, such as ``model.layers.0.self_attn.q_proj``.
        shapes: (out_features, in_features) of all modules of the adapter.
        rank, ranks: of tensor parallelism.
        exact: whether in_features of the shapes are known; else they are the least.

    Raises:
        SpftError: the weight is quantized or packed, or of another shape.
    """
    found = _module(modules, name)
    if found is not None:
        weight = _plain_weight(found, name)
        whole = shapes[name] if exact else (shapes[name][0], weight.shape[1])
        return Place(weight, 0, *_shard(name, whole, tuple(weight.shape), rank, ranks))
    parent, _, last = name.rpartition(".")
    fused = _PART_OF.get(last)
    found = _module(modules, f"{parent}.{fused}" if parent else fused) if fused else None
    if found is None:
        return None
    weight = _plain_weight(found, f"{parent}.{fused}")
    sizes = _rows_of_parts(found, weight.shape[0], parent, fused, shapes, ranks)
    index = FUSED[fused].index(last)
    held = sizes[index], weight.shape[1]
    whole = shapes[name] if exact else (shapes[name][0], weight.shape[1])
    return Place(weight, sum(sizes[:index]), *_shard(name, whole, held, rank, ranks))


def check_ties(
    modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]]
) -> None:
    """Check that each weight is that of the modules which it was one with in training, and of no other.

    Args:
        modules: of a model, by name.
        weights: by the name of the adapter's module, the parameter that holds its W.
        tied: the modules that computed with the delta of another one in training, by the name of that one.

    Raises:
        SpftError: the model ties other modules.
    """
    holders: dict[int, list[nn.Module]] = {}
    name_of = {module: name for name, module in modules.items()}
    for module in modules.values():
        held = module._parameters.get("weight")
        if held is not None and held.numel():
            holders.setdefault(held.data_ptr(), []).append(module)
    for name, weight in weights.items():
        here = holders.get(weight.data_ptr(), [])
        trained = [_module(modules, each) for each in tied.get(name, ())]
        for other, module in zip(tied.get(name, ()), trained):
            if module is not None and module not in here:
                raise SpftError(no_longer_tied([name, other], "this model"))
        strange = [] if len(here) < 2 else [each for each in here if each not in (_module(modules, name), *trained)]
        if strange:
            raise SpftError(
                f"{name} was a weight of its own where the adapter was trained, and is one with {name_of[strange[0]]} "
                "here: serve the base model that it was trained on, or the merged model (`axolotl spft merge`)"
            )


def check_trained_whole(parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Check that a weight that was trained whole is one with no other here, as it was in training.

    Args:
        parameters: of a model, by name, each under all of its names.
        trained: what takes the place of some of them, by name.

    Raises:
        SpftError: another module computes with the weight too, and was not trained to be equal.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.numel():
            names.setdefault(parameter.data_ptr(), []).append(name)
    for group in names.values():
        whole = next((name for name in group if name in trained), None)
        if whole is None:
            continue
        for other in group:
            if other not in trained or not torch.equal(trained[whole], trained[other]):
                raise SpftError(
                    f"{whole} was trained whole (`modules_to_save`), apart from {other}, and is one weight with it "
                    "here: serve the merged model (`axolotl spft merge`)"
                )


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    if name in modules:
        return modules[name]
    # by the end of the longer name: one of the two has a prefix that the other has not
    ends = [each for each in modules if each and (each.endswith(f".{name}") or name.endswith(f".{each}"))]
    deep = [each for each in ends if each.count(".") >= 2 or each.endswith(f".{name}")]
    if len(deep) > 1:
        raise SpftError(f"{name} may be any of {', '.join(deep)}: apply the adapter to the part that it belongs to")
    return modules[deep[0]] if deep else None


def _plain_weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or (
        weight.element_size() < 2
    ):  # fmt: skip
        found = type(weight).__name__ if not isinstance(weight, Tensor) else f"{weight.dtype}, {tuple(weight.shape)}"
        raise SpftError(
            f"{name} has no weight of 16 bits or more that a sparse adapter could be added to ({found}): serve the "
            "base model unquantized, or merge the adapter before it is quantized"
        )
    return weight.data


def _rows_of_parts(
    module: nn.Module, held: int, parent: str, fused: str, shapes: Shapes, ranks: int
) -> tuple[int, ...]:
    """How many of a fused weight's ``held`` rows each part has on this rank."""
    told = getattr(module, "output_partition_sizes", None)
    if told is not None and len(told) == len(FUSED[fused]) and sum(told) == held:
        return tuple(told)
    if fused == "gate_up_proj" and held % 2 == 0:
        return held // 2, held // 2
    known = {part: shapes[f"{parent}.{part}"][0] for part in FUSED[fused] if f"{parent}.{part}" in shapes}
    if "q_proj" in known:
        queries = known["q_proj"] // ranks
        keys = (held - queries) // 2
    elif ranks == 1:
        keys = next(iter(known.values()))
        queries = held - 2 * keys
    else:
        queries, keys = 0, 0
    if queries <= 0 or keys <= 0 or queries + 2 * keys != held:
        raise SpftError(
            f"{parent}.{fused} has {held} rows, which the adapter's shapes {known} do not explain on one of {ranks} "
            "ranks: it belongs to another model, or the engine fuses otherwise"
        )
    return queries, keys, keys


def _shard(name: str, whole: tuple[int, int], held: tuple[int, int], rank: int, ranks: int) -> tuple[range, range]:
    """The rows and the columns of W (``whole``) that a rank has where it has ``held`` of them."""
    parts = [_cut(size, here, rank, ranks) for size, here in zip(whole, held)]
    if None in parts or (whole[0] != held[0] and whole[1] != held[1]):
        raise SpftError(
            f"{name} has a weight of {held} on rank {rank} of {ranks}, but the adapter was trained on one of {whole}: "
            "serve the base model that it was trained on"
        )
    return parts[0], parts[1]


def _cut(size: int, here: int, rank: int, ranks: int) -> range | None:
    if here == size:
        return range(size)
    if here == 0 or size % here or size // here > ranks:
        return None
    # heads that are fewer than the ranks are held by several
    index = rank * (size // here) // ranks
    return range(index * here, (index + 1) * here)
