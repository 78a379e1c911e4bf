"""Which tensors of a checkpoint make each parameter of a model, by the rules that transformers loads with.

transformers renames keys, adds or drops prefixes, and for some architectures makes a parameter out of several tensors
(stacks the experts, splits a fused projection). Every such operation only moves entries. So where an entry of a
parameter stands in the file is found by sending numbered entries through the operation itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftFileError


@dataclass
class Group:
    """Tensors of a checkpoint that one operation of transformers makes into parameters.

    Attributes:
        converter: the operation; None where the tensor is the parameter as it stands.
        first_name: of the parameters that it makes.
        keys: checkpoint key -> the pattern of the operation that it matched, in the order of loading.
    """

    first_name: str
    converter: Any = None
    keys: dict[str, str] = field(default_factory=dict)

    def convert(self, tensors: Mapping[str, Tensor], config: object) -> dict[str, Tensor]:
        """The parameters made of ``tensors`` (one for each of ``keys``): name -> tensor."""
        if self.converter is None:
            return {self.first_name: next(iter(tensors.values()))}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys.items():
            converter.add_tensor(self.first_name, key, pattern, tensors[key])
        made = converter.convert(self.first_name, config=config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def places(self, shapes: Mapping[str, tuple[int, ...]], config: object) -> dict[str, Tensor]:
        """For each parameter the number of every entry, counted through all tensors of the group in turn."""
        total, numbered = 0, {}
        dtype = torch.int32 if sum(prod(shapes[key]) for key in self.keys) < 2**31 else torch.int64
        for key in self.keys:
            count = prod(shapes[key])
            numbered[key] = torch.arange(total, total + count, dtype=dtype).view(shapes[key])
            total += count
        places = self.convert(numbered, config)
        if sum(each.numel() for each in places.values()) != total or any(
            each.dtype != dtype for each in places.values()
        ):
            raise SpftFileError(
                f"{self.first_name}: transformers makes it from {', '.join(self.keys)} by more than moving entries, "
                "which cannot be undone in a file: load the model and merge in memory (merge_and_unload())"
            )
        return places


class KeyMap:
    """How the tensors of a checkpoint become the parameters of a model.

    Attributes:
        group_of: parameter name -> the group that makes it.
        parameters_of: checkpoint key -> the parameters that it is a part of; keys that the model leaves out have none.
        tied: parameter name -> the parameter whose tensor it shares, where the checkpoint has the other one only.
        doubled: pairs of parameters that are tied, where the checkpoint has a tensor of each.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self.config, self._shapes = model.config, shapes
        state = _parameters(model)
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        groups: dict[str, Group] = {}
        prefix = model.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name in state:
                group = groups.setdefault(name, Group(name, by_pattern[pattern] if pattern is not None else None))
                group.keys[key] = pattern
        self.group_of: dict[str, Group] = {}
        self.parameters_of: dict[str, list[str]] = {}
        for name, group in groups.items():
            for made in [name] if group.converter is None else self._names(group, shapes):
                self.group_of[made] = group
                for key in group.keys:
                    self.parameters_of.setdefault(key, []).append(made)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {}
        for name, source in tied.items():
            for absent, present in ((name, source), (source, name)):
                if absent not in self.group_of and present in self.group_of:
                    self.tied[absent] = present
        pairs = [(name, source) for name, source in tied.items() if {name, source} <= self.group_of.keys()]
        self.doubled = [*pairs, *((source, name) for name, source in pairs)]

    def _names(self, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        # on the meta device: the names alone, in no time
        tensors = {key: torch.empty(shapes[key], device="meta") for key in group.keys}
        return list(group.convert(tensors, self.config))

    def is_plain(self, name: str) -> bool:
        """Whether the parameter is one tensor of the checkpoint as it stands."""
        return self.group_of[name].converter is None

    def places(self, group: Group) -> dict[str, Tensor]:
        """See `Group.places`."""
        return group.places(self._shapes, self.config)

    def offsets(self, group: Group) -> dict[str, tuple[int, int]]:
        """Which numbers of `places` each tensor of the group has: key -> (first, last exclusive)."""
        total = 0
        found: dict[str, tuple[int, int]] = {}
        for key in group.keys:
            found[key] = (total, total + prod(self._shapes[key]))
            total = found[key][1]
        return found


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have where no adapter wraps their modules."""
    found: dict[str, Tensor] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        found |= {name.replace(".base_layer.", ".").replace(".original_module.", "."): each for name, each in named}
    return found
