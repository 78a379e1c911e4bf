"""A base checkpoint's safetensors files: where each tensor stands, read by tensor or by rows, never a file at once."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import read_json_object
from axolotl_spft.errors import SpftFileError, first_line
from axolotl_spft.files import check_safetensors

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: ``start`` and ``stop`` are bytes of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: key -> entry, in the order of the data, and the metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        SpftFileError: the file is not a complete safetensors file.
    """
    check_safetensors(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata, first = header.pop("__metadata__", {}), 8 + length
    entries = {
        key: Entry(given["dtype"], tuple(given["shape"]), *(first + offset for offset in given["data_offsets"]))
        for key, given in header.items()
    }
    return Header(dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata)


class Shards:
    """The tensors of a checkpoint in a folder: one ``model.safetensors``, or several files and an index.

    Attributes:
        headers: file name -> header, in the order of the names.
        file_of: key -> file name.

    Raises:
        SpftFileError: the folder holds no such checkpoint, or its index and its files disagree.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        names = self._file_names()
        self.headers = {name: read_header(self.folder / name) for name in names}
        self.file_of = {key: name for name, header in self.headers.items() for key in header.entries}
        self._check_index()

    def _file_names(self) -> list[str]:
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        if not (self.folder / INDEX_FILE).is_file():
            raise SpftFileError(
                f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: name the folder of a model that "
                "save_pretrained() has written (files of another format: load the model and save it again)"
            )
        names = sorted(set(_read_index(self.folder).values()))
        outside = [name for name in names if name != Path(name).name]
        if outside:
            raise SpftFileError(f"{self.folder / INDEX_FILE} names {outside[0]}, which must be a file of the folder")
        return names

    @property
    def has_index(self) -> bool:
        return list(self.headers) != [SINGLE_FILE]

    def _check_index(self) -> None:
        index = _read_index(self.folder) if self.has_index else {}
        wrong = [key for key, name in index.items() if self.file_of.get(key) != name]
        if wrong:
            raise SpftFileError(
                f"{self.folder / INDEX_FILE} says that {wrong[0]} is in {index[wrong[0]]}, which does not hold "
                "it: copy or save the checkpoint again"
            )

    def entry(self, key: str) -> Entry:
        return self.headers[self.file_of[key]].entries[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        name = self.entry(key).dtype
        if name not in DTYPES:
            raise SpftFileError(
                f"{self.folder / self.file_of[key]}: {key} has the dtype {name}, which is not read here"
            )
        return DTYPES[name]

    def read(self, key: str) -> Tensor:
        """The tensor under ``key``, in memory of its own."""
        entry, dtype = self.entry(key), self.dtype(key)
        return self._bytes(key, entry.start, entry.stop).view(dtype).view(entry.shape)

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (exclusive) of the tensor under ``key``, and nothing else of it."""
        entry, dtype = self.entry(key), self.dtype(key)
        row_bytes = (entry.stop - entry.start) // max(entry.shape[0], 1)
        first, last, _ = slice(first, last).indices(entry.shape[0])
        last = max(first, last)
        rows = self._bytes(key, entry.start + first * row_bytes, entry.start + last * row_bytes)
        return rows.view(dtype).view(last - first, *entry.shape[1:])

    def _bytes(self, key: str, start: int, stop: int) -> Tensor:
        path = self.folder / self.file_of[key]
        data = torch.empty(stop - start, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise SpftFileError(f"{path} became shorter while it was read: copy the checkpoint again")
                done += count
        return data


def size_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes in a file."""
    return prod(shape) * dtype.itemsize


def _read_index(folder: Path) -> Mapping[str, str]:
    """The file of each tensor, as a folder's index says it.

    Raises:
        SpftFileError: it says no such thing.
    """
    path = folder / INDEX_FILE
    weight_map = read_json_object(path, "copy or save the checkpoint again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SpftFileError(f"{path}: `weight_map` must say the file of each tensor; save the checkpoint again")
    return weight_map


def find_checkpoint(
    name: str | os.PathLike, revision: str | None = None, weights: bool = True, companions: bool = False
) -> Path:
    """The folder of a model: a local one, or that of the hub's cache, where it is downloaded if it is not there.

    Args:
        weights: whether its weights are needed too. Whoever has asked for the config or the tokenizer before has put
            these alone into the cache.
        companions: whether all that stands beside the weights is asked for: a cache whose weights are complete may
            lack a tokenizer or a processor. Where the hub cannot be reached, what the cache has is taken.

    Raises:
        SpftFileError: there is none.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    wanted = [*_COMPANIONS, *(["*.safetensors"] if weights else [])]
    reason, part = None, ""
    for only_local in (True, False):
        try:
            folder = Path(
                snapshot_download(str(name), revision=revision, allow_patterns=wanted, local_files_only=only_local)
            )
        except Exception as error:
            reason = first_line(error)
            continue
        if not only_local or not weights or _has_weights(folder):
            if only_local and companions:
                # of the commit that the weights are of
                with suppress(Exception):
                    snapshot_download(
                        str(name), revision=folder.name, allow_patterns=_COMPANIONS, local_files_only=False
                    )
            return folder
        part = f"; {folder} has not all of its weights as safetensors"
    raise SpftFileError(f"{name} is neither a folder nor a model that the hub gives ({reason}{part}): correct the name")


def _has_weights(folder: Path) -> bool:
    """Whether all files of a checkpoint are there."""
    if (folder / SINGLE_FILE).is_file():
        return True
    return (folder / INDEX_FILE).is_file() and all((folder / file).is_file() for file in _read_index(folder).values())
