"""The block at the end of a run: where the adapter lies, how large it is, and what can be done with it."""

from __future__ import annotations

import json
from pathlib import Path

from axolotl_spft.trainer.checkpoints import ADAPTER_FILE


def describe_adapter(folder: Path, commands: list[str]) -> str:
    """A few lines about the adapter that was saved in ``folder``, and ``commands`` to go on with, a line each."""
    size = (folder / ADAPTER_FILE).stat().st_size
    shown = f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
    nnz = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["nnz"]
    return "\n".join(
        [
            f"Sparse adapter: {folder} ({shown}, {nnz:,} values, {size / nnz:.1f} bytes each)",
            *(f"  {command}" for command in commands),
        ]
    )
