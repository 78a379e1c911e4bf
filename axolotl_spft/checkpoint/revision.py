"""The commit of the hub that an adapter's base is of: where the base is read from, and what of it is told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_spft.checkpoint.adapter import read_config
from axolotl_spft.checkpoint.shards import find_checkpoint
from axolotl_spft.checkpoint.trained_base import recorded_base
from axolotl_spft.errors import SpftFileError, first_line

_OF_A_CACHE = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")


class OtherCommitError(SpftFileError):
    """The commit that an adapter was trained on cannot be had, and nothing asks for another one."""


class FoundBase(NamedTuple):
    """The folder of a base model.

    Attributes:
        trained: the commit that the adapter records of a base of this name; None where it records none.
        commit: the one that the folder is of; None where that is not known.
    """

    folder: Path
    trained: str | None
    commit: str | None

    def summary(self) -> dict[str, Any]:
        """For a report in JSON."""
        return {"folder": str(self.folder), "commit": self.commit, "trained_commit": self.trained}


def find_base(adapter_folder: str | os.PathLike, name: str | os.PathLike, revision: str | None = None) -> FoundBase:
    """The base model that an adapter is merged onto.

    Args:
        name: a folder, or a name of the hub.
        revision: the branch, tag or commit to take. By default the commit that the adapter records of a base of this
            name, else the branch or tag that it records. Where ``revision`` is that branch or tag, the commit counts:
            it says more, and nothing else.

    Raises:
        OtherCommitError: the recorded commit cannot be had.
        SpftFileError: there is no such model, or the adapter is damaged.
    """
    config = read_config(Path(adapter_folder))
    own, commit = None, None
    # a path, though it may be one in the hub's cache, is where the base was, and no name of the hub
    is_of_hub = not Path(name).is_absolute() and not Path(name).expanduser().is_dir()
    if str(name) == config.get("base_model_name_or_path") and is_of_hub:
        own, commit = config.get("revision"), recorded_base(adapter_folder).get("commit")
    if commit is None or (revision or own) != own:
        folder = find_checkpoint(name, revision or own, companions=True)
        return FoundBase(folder, commit, commit_of(folder))
    try:
        return FoundBase(find_checkpoint(name, commit, companions=True), commit, commit)
    except SpftFileError as error:
        if _has_config(name, commit):
            raise
        other = f"another branch than {own}, or a commit by its number" if own else "main, say"
        raise OtherCommitError(
            f"{adapter_folder} was trained on the commit {commit} of {name}, which cannot be had "
            f"({first_line(error)}): get it, or say with `--revision` ({other}; in a configuration "
            "`revision_of_model`) or `--base` (a folder) onto what to merge instead"
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the hub's cache holds; None of other folders."""
    found = _OF_A_CACHE.search(folder.as_posix())
    return found.group(1) if found else None


def _has_config(name: str | os.PathLike, commit: str) -> bool:
    try:
        find_checkpoint(name, commit, weights=False)
    except SpftFileError:
        return False
    return True
