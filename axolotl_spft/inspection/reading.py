"""Masks and adapters from their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from axolotl_spft.checkpoint.skeleton import linear_shapes, skeleton
from axolotl_spft.errors import SpftFileError
from axolotl_spft.inspection.statistics import Matrix
from axolotl_spft.salience.mask_file import read_mask_file


@dataclass(frozen=True)
class SparseFile:
    """A mask (``kind`` mask) or an adapter (``kind`` adapter).

    Attributes:
        source: where the mask came from, as the file records it.
        matrices: by name, in the model's order where the file tells it.
        weights: parameter name -> W of an adapted embedding or head, where the adapter holds it: it may have grown.
    """

    path: Path
    kind: str
    source: Mapping[str, Any]
    matrices: dict[str, Matrix]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """One line: what it is, and where its mask came from."""
        made = ", ".join(f"{key} {value}" for key, value in self.source.items())
        return f"{self.kind} {self.path}" + (f" ({made})" if made else "")


def read_sparse_file(path: Path, base: Path | None) -> SparseFile:
    """Read a mask file, an adapter's folder or its ``adapter_model.safetensors``, and check all of it.

    Args:
        base: the folder of the base model, which tells the matrices' widths where the file does not record them.

    Raises:
        SpftFileError: it is damaged, another kind of file, or its widths are not known.
    """

    def shapes_of(names: list[str]) -> dict[str, tuple[int, int]]:
        if base is None:
            raise SpftFileError(
                f"{path} does not record how many columns its matrices have: name the folder of the base model with "
                "`--base`"
            )
        shapes = linear_shapes(skeleton(base, names))
        return {name: shapes[name] for name in names if name in shapes}

    if not path.is_dir() and path.name != WEIGHTS_FILE:
        masks, shapes, source = read_mask_file(path, shapes_of)
        matrices = {name: Matrix(name, mask, shapes[name][1]) for name, mask in masks.items()}
        return SparseFile(path, "mask", source, matrices)
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG_FILE).is_file():
        raise SpftFileError(f"{folder}: there is no {CONFIG_FILE}: name a mask file or the folder of an adapter")
    saved = read_adapter(folder)
    if not saved.has_shapes:
        saved = read_adapter(folder, shapes_of(list(saved.deltas)))
    matrices = {name: Matrix(name, delta.mask, delta.shape[1], delta.values) for name, delta in saved.deltas.items()}
    return SparseFile(path, "adapter", saved.mask_source, matrices, saved.embeddings)
