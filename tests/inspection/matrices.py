"""Random sparse matrices for the tests of `inspection`."""

from __future__ import annotations

import torch

from axolotl_spft.inspection.statistics import Matrix
from axolotl_spft.ops.mask.csr import mask_from_positions


def random_matrix(name: str, out_features: int, in_features: int, nnz: int, seed: int) -> Matrix:
    """A matrix with ``nnz`` values at random positions."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(out_features * in_features, generator=generator)[:nnz].sort().values
    values = torch.randn(nnz, generator=generator) / 64
    return Matrix(name, mask_from_positions(chosen, out_features, in_features), in_features, values)
