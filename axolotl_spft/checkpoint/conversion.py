"""Adapters of other methods, converted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, SavedAdapter, read_adapter, read_json_object, write_adapter
from axolotl_spft.checkpoint.shards import find_checkpoint
from axolotl_spft.checkpoint.shira import read_shira, write_shira
from axolotl_spft.checkpoint.skeleton import module_shapes, skeleton
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
        base: the base model, whose config tells the shapes of the modules where the file does not, and which of them
            SHiRA adapts. By default the one that the adapter records, as far as it can be had here.

    Returns:
        what was written; ``modules_checked``: whether it is known that SHiRA adapts all of them.

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
    model = _base_model(adapter, base)
    if not adapter.has_shapes and model is not None:
        adapter = read(source, module_shapes(model, adapter.deltas))
    report: dict[str, Any] = {"output": str(output), "to": to, "values": adapter.nnz}
    if to == "shira":
        linear = None if model is None else {
            name for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }  # fmt: skip
        report |= {**write_shira(output, adapter, linear), "modules_checked": model is not None}
    else:
        write_adapter(output, adapter)
    hand_on_tokenizer([Path(source)], Path(output))
    return report


def _base_model(adapter: SavedAdapter, base: str | os.PathLike | None) -> nn.Module | None:
    """The model of ``base``, or of the base that the adapter records: None where that cannot be had."""
    name = base or adapter.config.get("base_model_name_or_path")
    if not name:
        return None
    try:
        return skeleton(find_checkpoint(name, weights=False), adapter.deltas, adapter.config.get("task_type"))
    except SpftFileError:
        if base is not None:
            raise
        return None
