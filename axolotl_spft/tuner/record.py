"""The record of a mask and its values that travels in the adapter's file, beside its tensors.

It is one tensor, the bytes of a JSON object: a state dict, a checkpoint of any engine and a safetensors file all carry
it, and whatever installs the mask finds with it where the mask came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from axolotl_spft.config import SpftConfig, mask_option_names
from axolotl_spft.config_rules import check_options
from axolotl_spft.errors import SpftFileError
from axolotl_spft.tuner.trained_on import is_possible

NAME = "spft_record"
# in an adapter's file, which names no adapter
FILE_KEY = f"base_model.{NAME}"


def make_record(
    config: SpftConfig,
    shapes: Mapping[str, tuple[int, int]],
    source: Mapping | None,
    tied: Mapping[str, Sequence[str]],
    trained_on: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """What is to be known of a mask and its values.

    Args:
        config: the adapter's, whose options made the mask.
        shapes: (out_features, in_features) of each targeted module, in module order.
        source: salience, scope, samples read and seed; None where nothing is known of it.
        tied: the modules that compute with the delta of another one, by the name of that one.
        trained_on: what the values are added to, as `axolotl_spft.tuner.trained_on` tells it; empty where it is not
            known.

    Returns:
        ``mask_source``, ``options`` (those of `mask_option_names`), ``shapes``, ``tied`` and ``trained_on``.
    """
    return {
        "mask_source": None if source is None else dict(source),
        "options": {name: getattr(config, name) for name in mask_option_names()},
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "tied": {name: list(others) for name, others in tied.items()},
        "trained_on": dict(trained_on),
    }


def record_to_tensor(record: Mapping[str, Any]) -> Tensor:
    """The record as bytes: (length) uint8."""
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def record_from_tensor(tensor: Tensor) -> dict[str, Any]:
    """The record of `record_to_tensor`; what other tools have written may lack some of its parts.

    Raises:
        SpftFileError: the tensor holds something else.
    """
    try:
        record = json.loads(bytes(tensor.cpu().tolist()))
        options, shapes, source = record.get("options", {}), record.get("shapes", {}), record.get("mask_source")
        known = {name: value for name, value in options.items() if name in mask_option_names()}
        whole = all(len(shape) == 2 and all(isinstance(size, int) for size in shape) for shape in shapes.values())
        for names in record.get("tied", {}).values():
            whole &= isinstance(names, list) and all(isinstance(name, str) for name in names)
        whole &= is_possible(record.get("trained_on", {}))
        if not whole or not isinstance(source, (dict, type(None))) or check_options(known):
            raise ValueError
    except (ValueError, TypeError, AttributeError) as error:
        raise SpftFileError(
            f"the adapter's record ({NAME}) is damaged: load an intact copy of the file, or remove this tensor from it"
        ) from error
    return record


def record_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The record in the tensors of an adapter's file; empty for a file without one, as older ones are.

    ``record_of(tensors).get("shapes", {})`` gives [out_features, in_features] of each targeted module.

    Raises:
        SpftFileError: the record is damaged.
    """
    return record_from_tensor(tensors[FILE_KEY]) if FILE_KEY in tensors else {}


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """`record_of` the adapter's file at ``path``, of which nothing else is read.

    Raises:
        SpftFileError: the record is damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {FILE_KEY: file.get_tensor(FILE_KEY)} if FILE_KEY in file.keys() else {}  # noqa: SIM118
    try:
        return record_of(tensors)
    except SpftFileError as error:
        raise SpftFileError(f"{path}: {error}") from error
