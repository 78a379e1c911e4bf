"""`inspect_files`: everything that is told of one file or two, measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.skeleton import skeleton
from axolotl_spft.errors import SpftFileError
from axolotl_spft.inspection.overlap import Overlap, check_same_model, overlap_of
from axolotl_spft.inspection.reading import SparseFile, read_sparse_file
from axolotl_spft.inspection.statistics import Matrix, MatrixFigures, measure
from axolotl_spft.ops.weight.stacked import as_matrix


@dataclass(frozen=True)
class Inspection:
    """One file or two.

    Attributes:
        files: as they were read.
        figures: of each file's matrices.
        overlaps: of the matrices that both files hold, by name; None for one file.
        has_base: whether relative changes were measured.
    """

    files: tuple[SparseFile, ...]
    figures: tuple[tuple[MatrixFigures, ...], ...]
    overlaps: dict[str, Overlap] | None
    has_base: bool


def inspect_files(paths: Sequence[Path], base: Path | None = None) -> Inspection:
    """Read and measure one file, or two of the same model.

    Args:
        paths: mask files, adapters' folders or their ``adapter_model.safetensors``.
        base: the folder of the base model, which relative changes need.

    Raises:
        SpftFileError: a file is damaged or of another kind, or the two belong to different models.
    """
    files = tuple(read_sparse_file(path, base) for path in paths)
    if len(files) == 2:
        check_same_model(files[0].matrices, files[1].matrices, (str(paths[0]), str(paths[1])))
    checkpoint = None
    if base is not None:
        names = dict.fromkeys(name for file in files for name in file.matrices)
        checkpoint = BaseCheckpoint(base, skeleton(base, names))
    figures = tuple(_measured(file, checkpoint) for file in files)
    overlaps = None
    if len(files) == 2:
        one, other = (file.matrices for file in files)
        overlaps = {name: overlap_of(one[name], other[name]) for name in one if name in other}
    return Inspection(files, figures, overlaps, base is not None)


def _measured(file: SparseFile, base: BaseCheckpoint | None) -> tuple[MatrixFigures, ...]:
    def weight_of(matrix: Matrix) -> Tensor:
        weight = file.weights.get(base.parameter(matrix.name))
        # as a merge takes it
        weight = base.read_matrix(matrix.name) if weight is None else as_matrix(weight, matrix.name in base.transposed)
        if weight.shape != matrix.shape:
            raise SpftFileError(
                f"{file.path}: {matrix.name} is {matrix.shape}, but in {base.shards.folder} {tuple(weight.shape)}: "
                "name the folder of the base model that it was made for"
            )
        return weight

    # a small file is measured before a bar would help
    matrices = tqdm(file.matrices.values(), desc=file.path.name, unit="matrix", leave=False, delay=2)
    return tuple(measure(matrices, list(file.matrices), weight_of if base else None))
