"""The unquantized weights of a model, read from its checkpoint one matrix at a time by the module's name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from axolotl_spft.checkpoint.keys import KeyMap
from axolotl_spft.checkpoint.shards import Entry, Shards, find_checkpoint
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.weight.stacked import as_matrix
from axolotl_spft.tuner.expert_targets import stacked_parameters
from axolotl_spft.tuner.expert_weight import stores_transposed

# the last two of experts in MXFP4, as gpt-oss is published
_QUANTIZED = (
    ".quant_state.",
    ".absmax",
    ".SCB",
    ".qweight",
    ".weight_scale",
    ".weight_packed",
    "proj_blocks",
    "proj_scales",
)


class BaseCheckpoint:
    """A checkpoint with the names that a model has for its modules.

    Symbols: W of a module is (out_features, in_features), whichever way its class stores it.

    Args:
        name: a local folder, or a model of the hub.
        model: the transformers model that the checkpoint belongs to, on any device, quantized or not. Only names and
            classes of its modules are read.

    Raises:
        SpftFileError: there is no such checkpoint, or it was saved quantized.
    """

    def __init__(self, name: str | os.PathLike, model: nn.Module, revision: str | None = None):
        self.shards = Shards(find_checkpoint(name, revision))
        check_unquantized(self.shards)
        keys = self.shards.file_of
        self.keys = KeyMap(model, keys, {key: self.shards.shape(key) for key in keys})
        self.transposed = transposed_modules(model)
        self.embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def has(self, module: str) -> bool:
        """Whether the checkpoint holds the weight of ``module``."""
        return self._parameter(module) is not None

    def missing(self, modules: Iterable[str]) -> list[str]:
        """Those of ``modules`` whose weight the checkpoint does not hold."""
        return [module for module in modules if not self.has(module)]

    def _parameter(self, module: str) -> str | None:
        # a parameter of three dimensions, as stacked experts are, has a name without `weight`
        for name in (f"{module}.weight", module):
            name = self.keys.tied.get(name, name)
            if name in self.keys.group_of:
                return name
        return None

    def parameter(self, module: str) -> str:
        """The parameter that is the weight of ``module``, or that it is tied to.

        Raises:
            SpftFileError: the checkpoint does not hold it.
        """
        name = self._parameter(module)
        if name is None:
            raise SpftFileError(
                f"{self.shards.folder} holds no weight for the module {module}: name the base model that was trained"
            )
        return name

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """(out_features, in_features) of W of a module; see `read_matrix`."""
        name = self.parameter(module)
        group = self.keys.group_of[name]
        tensors = {key: torch.empty(self.shards.shape(key), device="meta") for key in group.keys}
        shape = tuple(group.convert(tensors, self.keys.config)[name].shape)
        return shape[::-1] if module in self.transposed else (prod(shape[:-1]), shape[-1])

    def check_shape(self, module: str, shape: tuple[int, ...], trained: tuple[int, int]) -> None:
        """Check that W of a module has the shape that it was trained in.

        Raises:
            SpftFileError: it has another one.
        """
        if shape != trained:
            raise SpftFileError(
                f"{module} is {shape} in {self.shards.folder}, but {trained} in the adapter: name the base model that "
                "was trained"
            )

    def read_parameter(self, name: str) -> Tensor:
        """A parameter as the model stores it, in the dtype of the checkpoint."""
        group = self.keys.group_of[name]
        return group.convert({key: self.shards.read(key) for key in group.keys}, self.keys.config)[name]

    def read_matrix(self, module: str) -> Tensor:
        """W of a module; of stacked experts (experts x out_features, in_features)."""
        weight = self.read_parameter(self.parameter(module))
        return as_matrix(weight, module in self.transposed).contiguous()

    def read_rows(self, module: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (exclusive) of W.

        Nothing else is read, unless the module stores its weight transposed or transformers makes it from several.
        """
        name = self.parameter(module)
        group = self.keys.group_of[name]
        (key, *_) = group.keys
        if group.converter is None and module not in self.transposed and len(self.shards.shape(key)) == 2:
            return self.shards.read_rows(key, first, last)
        return self.read_matrix(module)[first:last].clone()


def check_unquantized(shards: Shards) -> None:
    """Check that a checkpoint holds weights of 16 bits or more.

    Raises:
        SpftFileError: it was saved quantized.
    """
    found = [key for key in shards.file_of if any(part in key for part in _QUANTIZED)]
    # by their bytes: some have dtypes that torch knows under no name
    found += [key for key in shards.file_of if key.endswith(".weight") and _bits(shards.entry(key)) < 16]
    if found:
        raise SpftFileError(
            f"{shards.folder} was saved quantized ({found[0]}): name the folder of the model before it was quantized"
        )


def _bits(entry: Entry) -> float:
    return 8 * (entry.stop - entry.start) / prod(entry.shape) if prod(entry.shape) else 16


def transposed_modules(model: nn.Module) -> set[str]:
    """The modules that store W as (in_features, out_features): GPT-2's `Conv1D`, quantized or not, and some experts.

    The weights of experts go by the names of their parameters.
    """
    from transformers.pytorch_utils import Conv1D

    found = set()
    for name, module in model.named_modules():
        source = getattr(module, "source_cls", type(module))
        if isinstance(source, type) and issubclass(source, Conv1D):
            # a layer of PEFT keeps the module it adapts under this name
            found.add(name.removesuffix(".base_layer"))
    return found | {each.name for each in stacked_parameters(model) if stores_transposed(each.module)}
