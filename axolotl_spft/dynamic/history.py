"""What is known of a dynamic mask beside its positions: the first mask, since when each value is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import atomic_path, check_safetensors
from axolotl_spft.ops.mask.csr import Mask, positions, problems_of
from axolotl_spft.optim.rearrange import rearranged

FILE = "reselection.safetensors"
_FIRST_COLUMNS, _FIRST_ROW_OFFSETS, _BEGUN = ".first_columns", ".first_row_offsets", ".begun"


class Figures(NamedTuple):
    """Of a mask right after a re-selection.

    Attributes:
        step: after which it was.
        turnover: the share of all values that it exchanged.
        first_mask: the share of all positions that the first mask held too.
        mean_age: optimizer steps since a value began, on average; those of the first mask began at step 0.
    """

    step: int
    turnover: float
    first_mask: float
    mean_age: float


class History:
    """The first mask and the ages of the values of some matrices; all kept on the host.

    Args:
        masks: name -> the first mask.
        shapes: name -> (out_features, in_features).
    """

    def __init__(self, masks: Mapping[str, Mask], shapes: Mapping[str, tuple[int, int]]):
        self.shapes = dict(shapes)
        self.first = {name: Mask(*(part.cpu() for part in mask)) for name, mask in masks.items()}
        # the step after which each value began: (nnz) int32
        self.begun = {name: torch.zeros(mask.nnz, dtype=torch.int32) for name, mask in masks.items()}
        self.figures: Figures | None = None

    def move(self, name: str, sources: Tensor, step: int) -> None:
        """Take note of an exchange in a matrix, with ``sources`` as of `axolotl_spft.optim.rearrange.rearranged`."""
        sources = sources.cpu()
        begun = rearranged(self.begun[name], sources)
        begun[sources < 0] = step
        self.begun[name] = begun

    def summarize(self, masks: Mapping[str, Mask], exchanged: int, step: int) -> Figures:
        """The figures after a re-selection that has led to ``masks`` and exchanged so many values."""
        values = sum(mask.nnz for mask in masks.values())
        shared = sum(self._shared(name, mask) for name, mask in masks.items())
        ages = sum((step - begun.to(torch.int64)).sum().item() for begun in self.begun.values())
        self.figures = Figures(step, exchanged / values, shared / values, ages / values)
        return self.figures

    def _shared(self, name: str, mask: Mask) -> int:
        in_features = self.shapes[name][1]
        first, now = (
            positions(self.first[name], in_features),
            positions(Mask(*(part.cpu() for part in mask)), in_features),
        )
        return int(torch.isin(now, first, assume_unique=True).sum())

    def save(self, path: Path) -> None:
        """Write everything; the file appears complete or not at all."""
        tensors = {}
        for name, mask in self.first.items():
            tensors[name + _FIRST_COLUMNS], tensors[name + _FIRST_ROW_OFFSETS] = mask
            tensors[name + _BEGUN] = self.begun[name]
        metadata = {"format": "pt", "figures": json.dumps(self.figures)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def load(self, path: Path) -> None:
        """Go on from a file of `save`.

        Raises:
            SpftFileError: it is damaged, or belongs to other matrices or another number of values.
        """
        check_safetensors(path)
        first, begun, problems = {}, {}, []
        with safe_open(path, framework="pt") as file:
            keys, figures = set(file.keys()), json.loads((file.metadata() or {}).get("figures", "null"))
            for name, shape in self.shapes.items():
                if not {name + _FIRST_COLUMNS, name + _FIRST_ROW_OFFSETS, name + _BEGUN} <= keys:
                    problems.append(f"{name} is not in it")
                    continue
                first[name] = Mask(*(file.get_tensor(name + part) for part in (_FIRST_COLUMNS, _FIRST_ROW_OFFSETS)))
                begun[name] = file.get_tensor(name + _BEGUN)
                found = problems_of(first[name], torch.zeros(first[name].nnz), *shape)
                if begun[name].shape != self.begun[name].shape or first[name].nnz != self.begun[name].numel():
                    found.append(f"{begun[name].numel()} values, not {self.begun[name].numel()}")
                problems += [f"{name}: {problem}" for problem in found]
        if problems:
            raise SpftFileError(
                f"{path} is damaged or belongs to another run ({problems[0]}): resume from an intact checkpoint"
            )
        self.first, self.begun = first, begun
        self.figures = None if figures is None else Figures(*figures)
