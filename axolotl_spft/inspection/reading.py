"""Masks and adapters from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.files import check_safetensors
from axolotl_spft.inspection.base import BaseWeights
from axolotl_spft.inspection.statistics import Matrix
from axolotl_spft.ops.mask.csr import Mask, problems_of

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_COLUMNS, _ROW_OFFSETS, _VALUES = ".spft_columns", ".spft_row_offsets", ".spft_values"


@dataclass(frozen=True)
class SparseFile:
    """A mask (``kind`` mask) or an adapter (``kind`` adapter).

    Attributes:
        source: where the mask came from, as the file records it.
        matrices: by name, in the file's order.
    """

    path: Path
    kind: str
    source: Mapping[str, Any]
    matrices: dict[str, Matrix]

    @property
    def title(self) -> str:
        """One line: what it is, and where its mask came from."""
        made = ", ".join(f"{key} {value}" for key, value in self.source.items())
        return f"{self.kind} {self.path}" + (f" ({made})" if made else "")


def read_sparse_file(path: Path, base: BaseWeights | None) -> SparseFile:
    """Read a mask file, an adapter's folder or its ``adapter_model.safetensors``, and check all of it.

    Args:
        base: tells the widths of the matrices where the file does not record them.

    Raises:
        SpftFileError: it is damaged, another kind of file, or its widths are not known.
    """
    folder = path if path.is_dir() else path.parent
    weights = path / _WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise SpftFileError(f"{path}: there is no {_WEIGHTS} in this folder: name a mask file or an adapter's folder")
    check_safetensors(weights)
    config = _config_of(folder) if path.is_dir() or path.name == _WEIGHTS else {}
    if config and config.get("peft_type") != "SPFT":
        raise SpftFileError(
            f"{path} is an adapter of the type {config.get('peft_type')}: name one that `adapter: spft` trained"
        )
    with safe_open(weights, framework="pt") as file:
        keys = {key.removeprefix("base_model.model."): key for key in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
        names = [key.removesuffix(_COLUMNS) for key in keys if key.endswith(_COLUMNS)]
        if not names:
            raise SpftFileError(f"{path} holds no sparse matrix: name a mask file or an adapter that spft trained")
        shapes = {**_object(config.get("shapes")), **_object(header.get("mask_shapes"))}
        names.sort(key=list(shapes).index if shapes.keys() >= set(names) else _by_numbers)
        kind = "adapter" if any(name + _VALUES in keys for name in names) else "mask"
        problems, matrices = [], {}
        for name in names:
            endings = (_COLUMNS, _ROW_OFFSETS, *([_VALUES] if kind == "adapter" else []))
            absent = [ending[1:] for ending in endings if name + ending not in keys]
            if absent:
                problems.append(f"{name}: {', '.join(absent)} missing")
                continue
            columns, row_offsets, *values = (file.get_tensor(keys[name + ending]) for ending in endings)
            mask = Mask(columns, row_offsets)
            out_features, in_features = _shape_of(name, mask, shapes, base, path)
            given = values[0] if values else torch.zeros(mask.nnz)
            problems += [f"{name}: {text}" for text in problems_of(mask, given, out_features, in_features)]
            matrices[name] = Matrix(name, mask, in_features, *values)
    if problems:
        raise SpftFileError(f"{path} is damaged: {first_of(problems, '; ')}. Copy or save it again")
    source = _object(config.get("mask_source")) or _object(header.get("mask_source"))
    return SparseFile(path, kind, source, matrices)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape_of(
    name: str, mask: Mask, shapes: Mapping[str, Any], base: BaseWeights | None, path: Path
) -> tuple[int, int]:
    shape = shapes.get(name)
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape):
        return tuple(shape)
    if base is None:
        raise SpftFileError(
            f"{path} does not record how many columns {name} has: name the folder of the base model with `--base`"
        )
    return base.shape(name, mask.out_features)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpftFileError(f"{path}: no readable JSON ({error}); copy or save it again") from error
    return _object(config)


def _object(value: Any) -> dict[str, Any]:
    """``value`` if it is a JSON object or the text of one, else an empty one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}
