"""Files on disk: atomic writes and the header of an adapter file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from axolotl_spft.errors import SpftFileError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        # mkstemp lets nobody else read
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(sources: Mapping[str, Path], folder: Path) -> None:
    """Copy files into ``folder``, each under its name there: complete or not at all."""
    for name, path in sources.items():
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(path, temporary)


def check_writable(path: Path) -> None:
    """Check that a file can be written to ``path``, and make its folder: before the work whose result it will hold.

    Raises:
        SpftFileError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpftFileError(f"nothing can be written to {path}: {error}: name another file") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise SpftFileError(f"nothing can be written to {path}: name a file in a folder that you may write to")


def check_safetensors(path: str | os.PathLike) -> None:
    """Check that a safetensors file is complete, by its header and length alone.

    Raises:
        SpftFileError: the file is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise SpftFileError(f"{path}: not a complete safetensors file ({error}); copy or save it again") from error


def count_entries(path: str | os.PathLike, ending: str) -> int:
    """How many entries the one-dimensional tensors of a safetensors file have whose names end so; reads its header."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if name.endswith(ending)]  # noqa: SIM118
        return sum(file.get_slice(name).get_shape()[0] for name in names)
