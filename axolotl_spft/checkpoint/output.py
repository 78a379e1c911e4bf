"""The folder that a merge writes to: what may stand there, and what of that makes room for the merged model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
from axolotl_spft.checkpoint.companions import remove_stale
from axolotl_spft.checkpoint.shards import INDEX_FILE, read_header
from axolotl_spft.errors import SpftFileError, first_of

# in the metadata of every weight file of a merge
MARK = "spft_merge"
_STAGING = ".spft-merge"
# the names that transformers saves the weights of a model under, and the indices of these
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


class MergeOutput:
    """A merge's output folder.

    The merged model takes the place of an earlier merge, which its weight files are known by; of another model only if
    that was asked for.

    Args:
        overwrite: whether the weights of another model may be removed.

    Attributes:
        staging: where the files are written before all of them are put in place.
    """

    def __init__(self, folder: Path, overwrite: bool = False):
        self.folder, self.staging, self._overwrite = folder, folder / _STAGING, overwrite

    def check(self, sources: Mapping[str, Path]) -> None:
        """Check that a merge may write here, by names and headers in the folder alone.

        Args:
            sources: folders that the merge reads, by what they are.

        Raises:
            SpftFileError: it is one of these, holds an adapter or another model's weights, or a folder is in the way.
        """
        for name, source in sources.items():
            if source.is_dir() and self.folder.resolve() == source.resolve():
                raise SpftFileError(f"the output {self.folder} is the folder of the {name}: name another one")
        files = self._weights()
        self._check_folders(path.name for path in files)
        ours = [path for path in files if _has_mark(path)]
        adapter = [name for name in (WEIGHTS_FILE, "adapter_model.bin") if (self.folder / name).exists()]
        if (self.folder / CONFIG_FILE).exists() and not ours and not self._overwrite:
            adapter.append(CONFIG_FILE)
        if adapter:
            raise SpftFileError(
                f"the output {self.folder} holds an adapter ({adapter[0]}), for which readers would take the "
                "merged model too: name another folder"
            )
        strange = [path.name for path in files if path not in ours]
        if strange and not self._overwrite:
            raise SpftFileError(
                f"the output {self.folder} holds weights that are no merge of this package "
                f"({first_of(strange, ', ')}): name another folder, or add `--overwrite` to replace the model there"
            )

    def put_in_place(self, weights: Sequence[str], others: Sequence[str]) -> None:
        """Move what is finished here, and remove what is left of the model that was here.

        Args:
            weights: the weight files of the merged model and their index, by name.
            others: its other files.

        Raises:
            SpftFileError: a folder is in the way of a file; nothing has changed then.
        """
        self._check_folders([*weights, *others])
        replaces = self._overwrite or any(_has_mark(path) for path in self._weights())
        for name in [*weights, *others]:
            if (self.staging / name).exists():
                os.replace(self.staging / name, self.folder / name)
        # readers would take the weights of another layout first, or together with these
        left = [path for path in self._weights() if _has_mark(path)] + [self.folder / INDEX_FILE]
        if self._overwrite:
            left += [path for path in self.folder.iterdir() if _WEIGHTS.fullmatch(path.name)]
        for path in left:
            if path.name not in weights:
                path.unlink(missing_ok=True)
        if replaces:
            remove_stale(self.folder, others)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _weights(self) -> list[Path]:
        return sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("pytorch_model*.bin")])

    def _check_folders(self, names: Iterable[str]) -> None:
        for name in names:
            if (self.folder / name).is_dir():
                raise SpftFileError(
                    f"{self.folder / name} is a folder, and its name that of a file of a model: move it elsewhere, or "
                    "name another output, and run the same command again"
                )


def _has_mark(path: Path) -> bool:
    try:
        return MARK in read_header(path).metadata
    except SpftFileError:
        return False
