"""A cache of the hub on the disk, with several commits of one model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest


def fill_cache(cache: Path, name: str, commits: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let ``cache`` be the hub's cache, which holds the model ``name``, and no network be there.

    Args:
        commits: branch -> the folder that it is a copy of.

    Returns:
        branch -> its commit.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    found = {}
    for number, (branch, folder) in enumerate(commits.items(), 10):
        found[branch] = f"{number:x}" * 40
        shutil.copytree(folder, model / "snapshots" / found[branch])
        (model / "refs" / branch).write_text(found[branch])
    return found


def move_branch(cache: Path, name: str, branch: str, commit: str) -> None:
    """Let a branch of a model in the cache be another commit, as its author's next one makes it."""
    (cache / f"models--{name.replace('/', '--')}" / "refs" / branch).write_text(commit)
