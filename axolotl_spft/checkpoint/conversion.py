"""Adapters of other methods, converted."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, read_adapter, read_json_object, write_adapter
from axolotl_spft.checkpoint.shards import find_checkpoint
from axolotl_spft.checkpoint.shira import read_shira, write_shira
from axolotl_spft.checkpoint.skeleton import shapes_in
from axolotl_spft.checkpoint.tokenizer_files import hand_on_tokenizer
from axolotl_spft.errors import SpftFileError
from axolotl_spft.peft_type import SPFT

_KINDS = {SPFT: "spft", "SHIRA": "shira"}


def convert(
    source: str | os.PathLike, output: str | os.PathLike, to: str | None = None, base: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Convert a saved adapter, and the tokenizer beside it, between SHiRA and this package.

    Args:
        to: ``spft`` or ``shira``; by default the other one than ``source`` is.
        base: the base model, whose config tells the shapes of the modules where the file does not.

    Raises:
        SpftFileError: the adapter is of another kind, damaged, or the format cannot hold it.
    """
    config = read_json_object(Path(source) / CONFIG_FILE, "name the folder of a saved adapter")
    kind = _KINDS.get(config.get("peft_type"))
    if kind is None:
        raise SpftFileError(f"{source}: `peft_type: {config.get('peft_type')}` must be SPFT or SHIRA")
    to = to or ("shira" if kind == "spft" else "spft")
    if to == kind:
        raise SpftFileError(f"{source} is an adapter of the kind {kind} already: name another one, or another `--to`")
    read = read_adapter if kind == "spft" else read_shira
    adapter = read(source)
    if not adapter.has_shapes and base is not None:
        adapter = read(source, _shapes(base, adapter.deltas))
    report: dict[str, Any] = {"output": str(output), "to": to, "values": adapter.nnz}
    if to == "shira":
        report |= write_shira(output, adapter)
    else:
        write_adapter(output, adapter)
    hand_on_tokenizer([Path(source)], Path(output))
    return report


def _shapes(base: str | os.PathLike, modules: Collection[str]) -> dict[str, tuple[int, int]]:
    return shapes_in(find_checkpoint(base, weights=False), modules)
