"""The base model's weights, read from the safetensors files of its folder, one matrix at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import check_safetensors

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class BaseWeights:
    """The 2-dimensional weights of a folder with ``model.safetensors`` or its shards, by module name.

    Raises:
        SpftFileError: there are no such files, or one is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {key: folder / file for key, file in _files_of_keys(folder).items() if key.endswith(".weight")}
        self._checked: set[Path] = set()

    def shape(self, name: str, out_features: int) -> tuple[int, int]:
        """(out_features, in_features) of the module ``name``, whose weight may be stored transposed."""
        with self._opened(name) as (file, key):
            stored = tuple(file.get_slice(key).get_shape())
        if len(stored) != 2 or out_features not in stored:
            raise SpftFileError(
                f"{self.folder}: {key} has the shape {stored}, but the matrix in the file has {out_features} rows: "
                "name the folder of the unquantized model that it was made for"
            )
        return out_features, stored[1] if stored[0] == out_features else stored[0]

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The weight of the module ``name``, of ``shape`` (out_features, in_features)."""
        with self._opened(name) as (file, key):
            weight = file.get_tensor(key)
        if weight.is_floating_point() and tuple(weight.shape) == shape:
            return weight
        if weight.is_floating_point() and tuple(weight.shape) == shape[::-1]:
            return weight.T
        raise SpftFileError(
            f"{self.folder}: {key} is {weight.dtype} of the shape {tuple(weight.shape)}, but must be floating point of "
            f"{shape}: name the folder of the unquantized model that the adapter was made for"
        )

    def _opened(self, name: str):
        key = f"{name}.weight"
        if key not in self._files:
            # saved from another head class, a model may have lost or gained the first part of its names
            matches = [each for each in self._files if each.endswith(f".{key}") or key.endswith(f".{each}")]
            if len(matches) != 1:
                raise SpftFileError(
                    f"{self.folder} holds no {key}: name the folder of the model that the file was made for"
                )
            key = matches[0]
        path = self._files[key]
        if path not in self._checked:
            check_safetensors(path)
            self._checked.add(path)
        return _Opened(path, key)


class _Opened:
    """An open file and the key in it."""

    def __init__(self, path: Path, key: str):
        self._file, self._key = safe_open(path, framework="pt"), key

    def __enter__(self):
        return self._file.__enter__(), self._key

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def _files_of_keys(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    if (folder / _INDEX).is_file():
        try:
            return dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, LookupError, TypeError) as error:
            raise SpftFileError(f"{folder / _INDEX}: no readable index ({error}); copy or save it again") from error
    if (folder / _SINGLE).is_file():
        check_safetensors(folder / _SINGLE)
        with safe_open(folder / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    raise SpftFileError(
        f"{folder}: neither {_SINGLE} nor {_INDEX} is there: name the folder of the base model, saved as safetensors"
    )
