"""One safetensors file written beside its place and renamed: some tensors made anew, the rest copied byte by byte."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_spft.checkpoint.shards import DTYPES, Entry, Header, read_header
from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import atomic_path

_PIECE_BYTES = 16 * 2**20


def write_shard(
    path: Path,
    source: Path,
    old: Mapping[str, Entry],
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    pool: Executor,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file; as many tensors are in memory at a time as ``pool`` has threads.

    Args:
        source: the file that the tensors of ``old`` are in.
        old: key -> where it stands in ``source``, of every tensor that is kept, in the order in which to write.
        new: key -> (dtype as the format names it, shape), of those that ``make`` gives instead, or in addition.
        progress: is told how many bytes were written.

    Raises:
        SpftFileError: the disk is full, or refuses for another reason; nothing has changed then.
    """
    sizes = {key: (entry.dtype, entry.shape) for key, entry in old.items()} | dict(new)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    places = {}
    for key, (dtype, shape) in sizes.items():
        length = prod(shape) * DTYPES[dtype].itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        places[key] = offset
        offset += length
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    first = 8 + len(head)
    try:
        with atomic_path(path) as temporary, temporary.open("r+b", buffering=0) as file, source.open("rb") as given:
            os.ftruncate(file.fileno(), first + offset)
            _write(file.fileno(), struct.pack("<Q", len(head)) + head, 0)

            def place(key: str) -> None:
                at = first + places[key]
                if key in new:
                    tensor, expected = make(key), (DTYPES[new[key][0]], new[key][1])
                    if (tensor.dtype, tuple(tensor.shape)) != expected:
                        # its bytes would run over its neighbour's
                        raise AssertionError(f"{key} was made as {tensor.dtype} {tuple(tensor.shape)}, not {expected}")
                    _write(file.fileno(), tensor.contiguous().flatten().view(torch.uint8).numpy(), at)
                else:
                    _copy(given.fileno(), old[key], file.fileno(), at)
                progress(prod(sizes[key][1]) * DTYPES[sizes[key][0]].itemsize)

            for _ in pool.map(place, sizes):
                pass
    except OSError as error:
        raise SpftFileError(
            f"{path} cannot be written ({error.strerror or error}): what was there is as it was; make room or name "
            "another folder, and run the same command again: it goes on with the files that are finished"
        ) from error


def is_written(path: Path, mark: Mapping[str, str]) -> Header | None:
    """The header of a complete file whose metadata hold ``mark``; None if there is none."""
    try:
        header = read_header(path)
    except SpftFileError:
        return None
    return header if mark.items() <= header.metadata.items() else None


def _write(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        count = os.pwrite(descriptor, view[:_PIECE_BYTES], at)
        view, at = view[count:], at + count


def _copy(source: int, entry: Entry, descriptor: int, at: int) -> None:
    start = entry.start
    while start < entry.stop:
        piece = os.pread(source, min(_PIECE_BYTES, entry.stop - start), start)
        if not piece:
            raise OSError("the file that is read became shorter")
        _write(descriptor, piece, at)
        start, at = start + len(piece), at + len(piece)
