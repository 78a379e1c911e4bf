"""A mask on disk: safetensors with ``<module>.spft_columns`` and ``<module>.spft_row_offsets`` per matrix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.files import atomic_path, check_safetensors, check_writable
from axolotl_spft.ops.mask.csr import Mask, problems_of
from axolotl_spft.tuner.originals import problems_of_originals
from axolotl_spft.tuner.record import read_record
from axolotl_spft.tuner.state import ORIGINALS

_COLUMNS, _ROW_OFFSETS = ".spft_columns", ".spft_row_offsets"


def save_masks(
    path: str | os.PathLike, masks: Mapping[str, Mask], shapes: Mapping[str, tuple[int, int]], source: Mapping
) -> None:
    """Write masks, and where they came from; the file appears complete or not at all.

    Args:
        masks: name -> mask.
        shapes: name -> (out_features, in_features), which lets the file be read without its model.
    """
    tensors = {}
    for name, mask in masks.items():
        tensors[name + _COLUMNS] = mask.columns.cpu()
        tensors[name + _ROW_OFFSETS] = mask.row_offsets.cpu()
    recorded = {"mask_source": dict(source), "mask_shapes": {name: list(shapes[name]) for name in masks}}
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in recorded.items()}}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def check_mask_path(path: Path) -> None:
    """Check that ``path`` names a whole mask file, or where there is none, that one can be written.

    Raises:
        SpftFileError: it does not; the message names the option ``mask_path``.
    """
    try:
        check_safetensors(path) if path.is_file() else check_writable(path)
    except SpftFileError as error:
        raise SpftFileError(f"`mask_path: {path}`: {error}") from error


def read_mask_file(
    path: str | os.PathLike, shapes_of: Callable[[list[str]], Mapping[str, tuple[int, int]]]
) -> tuple[dict[str, Mask], dict[str, tuple[int, int]], dict]:
    """Read a mask file without its model.

    Args:
        shapes_of: names -> name -> (out_features, in_features), asked where the file does not record the shapes.

    Returns:
        name -> mask and name -> (out_features, in_features), in the model's order where it is recorded; the source.

    Raises:
        SpftFileError: the file is damaged, or no mask file.
    """
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        header, keys = file.metadata() or {}, set(file.keys())
    source, recorded = (_parsed(header.get(key, "{}")) for key in ("mask_source", "mask_shapes"))
    if not isinstance(source, dict) or not isinstance(recorded, dict):
        raise SpftFileError(f"{path}: its header is damaged; copy it again")
    names = {key.removesuffix(_COLUMNS) for key in keys if key.endswith(_COLUMNS)}
    if not names or any(not key.endswith((_COLUMNS, _ROW_OFFSETS)) for key in keys):
        raise SpftFileError(f"{path} is another kind of file: name a mask file or a sparse adapter")
    if recorded.keys() != names:
        recorded = shapes_of(sorted(names, key=_by_numbers))
    shapes = {name: tuple(shape) for name, shape in recorded.items()}
    masks, _ = load_masks(path, shapes, "Copy or make it again")
    return masks, shapes, source


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def load_masks(
    path: str | os.PathLike, shapes: Mapping[str, tuple[int, int]], remedy: str
) -> tuple[dict[str, Mask], dict]:
    """Read masks for matrices of the given shapes.

    Both a mask file and an adapter's ``adapter_model.safetensors`` can be read; the source, which is returned too, is
    in the header of the one and in the record of the other.

    Args:
        shapes: name -> (out_features, in_features).
        remedy: what to do when the file does not fit, the last sentence of the error.

    Raises:
        SpftFileError: the file is damaged or does not fit these matrices.
    """
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        keys = {_bare(key): key for key in file.keys()}  # noqa: SIM118
        source = _parsed((file.metadata() or {}).get("mask_source", "{}"))
        given = {key.removesuffix(_COLUMNS) for key in keys if key.endswith(_COLUMNS)}
        problems = [f"{name}: not in the file" for name in shapes.keys() - given]
        problems += [f"{name}: the model has no such targeted module" for name in given - shapes.keys()]
        problems += [] if isinstance(source, dict) else ["mask_source in its header is no JSON object"]
        masks = {}
        for name in (name for name in shapes if name in given):
            if name + _ROW_OFFSETS not in keys:
                problems.append(f"{name}: spft_row_offsets missing")
                continue
            mask = Mask(*(file.get_tensor(keys[name + ending]) for ending in (_COLUMNS, _ROW_OFFSETS)))
            problems += [f"{name}: {text}" for text in problems_of(mask, torch.zeros(mask.nnz), *shapes[name])]
            masks[name] = mask
    source = read_record(path).get("mask_source") or source
    if problems:
        raise SpftFileError(
            f"the mask in {path} is damaged or belongs to another model: {'; '.join(sorted(problems)[:5])}. {remedy}"
        )
    return masks, source


def load_originals(path: str | os.PathLike, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """The original weights of the repaired matrices of an adapter's ``adapter_model.safetensors``: (nnz) by name.

    Args:
        masks: that it holds, by name.

    Raises:
        SpftFileError: they do not fit the masks, or are not as many as the file records.
    """
    found, problems = {}, []
    with safe_open(path, framework="pt") as file:
        for key in (key for key in file.keys() if key.endswith(f".{ORIGINALS}")):  # noqa: SIM118
            name, tensor = _bare(key).removesuffix(f".{ORIGINALS}"), file.get_tensor(key)
            held = masks[name].nnz if name in masks else 0
            problems += [f"{name}: {text}" for text in problems_of_originals(tensor, held)]
            found[name] = tensor
    recorded = (read_record(path).get("mask_source") or {}).get("repaired", 0)
    if not problems and recorded and recorded != sum(map(len, found.values())):
        problems.append(f"{sum(map(len, found.values()))} original weights, but it records {recorded}")
    if problems:
        raise SpftFileError(f"{path} is damaged: {first_of(problems, '; ')}. Take an intact copy of it")
    return found


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")
