"""Directories that are built once, appear only when complete, and are reused while their settings match."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SETTINGS_FILE = "quickstart.json"


def ensure(directory: Path, settings: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """Build ``directory``, unless it was already built with these settings and this Python version.

    Args:
        directory: where the artefact lies when it is complete.
        settings: all that decides what the artefact holds, as JSON values; recorded beside it.
        build: writes the artefact into the empty directory that it is given.

    Returns:
        Whether it was built now.

    Raises:
        FileExistsError: if ``directory`` holds something that this function did not write.
    """
    wanted = json.loads(json.dumps({**settings, "python": platform.python_version()}))
    record = directory / SETTINGS_FILE
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == wanted:
        return False
    if directory.exists() and not record.is_file():
        raise FileExistsError(
            f"{directory} exists and holds no {SETTINGS_FILE}, so the quickstart did not write it: "
            "move it away, or choose another output directory"
        )
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    (partial / SETTINGS_FILE).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
    return True
