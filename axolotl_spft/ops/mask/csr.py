"""The sparse mask in compressed sparse rows (CSR).

Symbols: a weight has shape (out_features, in_features); ``nnz`` is how many of its entries are trained.
``columns`` (nnz) holds the column of each entry, rows ascending and columns strictly ascending in a row;
``row_offsets`` (out_features + 1, int32) says where each row begins. A position is row * in_features + column. Nothing
else with nnz numbers is kept of a mask: what an operation needs is worked out while it runs.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError


class Mask(NamedTuple):
    """A CSR mask: ``columns`` (nnz; uint16 or int32) and ``row_offsets`` (out_features + 1; int32)."""

    columns: Tensor
    row_offsets: Tensor

    @property
    def nnz(self) -> int:
        return self.columns.numel()

    @property
    def out_features(self) -> int:
        return self.row_offsets.numel() - 1


def column_dtype(in_features: int) -> torch.dtype:
    """The smallest dtype of the file format that holds every column."""
    return torch.uint16 if in_features <= 2**16 else torch.int32


def empty_mask(out_features: int, in_features: int, device: torch.device | None = None) -> Mask:
    """The mask without entries."""
    return Mask(
        torch.empty(0, dtype=column_dtype(in_features), device=device),
        torch.zeros(out_features + 1, dtype=torch.int32, device=device),
    )


def mask_from_positions(positions: Tensor, out_features: int, in_features: int) -> Mask:
    """The mask with entries at ``positions`` (nnz; int64, strictly ascending).

    Raises:
        SpftError: there are more than the row offsets can count.
    """
    most = torch.iinfo(torch.int32).max
    if positions.numel() > most:
        raise SpftError(
            f"{positions.numel():,} values in one matrix are too many: its row offsets count at most {most:,}: lower "
            "its density"
        )
    rows = positions // in_features
    counts = torch.bincount(rows, minlength=out_features)
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int32, device=positions.device)
    row_offsets[1:] = counts.cumsum(0)
    return Mask((positions % in_features).to(column_dtype(in_features)), row_offsets)


def row_indices(offsets: Tensor, nnz: int) -> Tensor:
    """Which row each of ``nnz`` entries is in, for rows that begin at ``offsets`` (rows + 1): (nnz), its dtype."""
    return torch.repeat_interleave(offsets.diff(), output_size=nnz)


def strides(weight: Tensor, transposed: bool) -> tuple[int, ...]:
    """How far apart the rows of W and its columns are, for a ``weight`` that may be stored transposed."""
    return weight.stride()[::-1] if transposed else weight.stride()


def positions(mask: Mask, in_features: int, transposed: bool = False) -> Tensor:
    """The position of each entry in the flattened weight, ascending, or in that of its transpose: (nnz) int64."""
    rows, columns = row_indices(mask.row_offsets, mask.nnz), mask.columns.to(torch.int64)
    return rows.add(columns, alpha=mask.out_features) if transposed else columns.add(rows, alpha=in_features)


def used_rows(mask: Mask) -> Tensor:
    """The rows that hold an entry: int64, ascending."""
    return mask.row_offsets.diff().nonzero().squeeze(1)


def used_columns(mask: Mask, in_features: int) -> Tensor:
    """The columns that hold an entry: int64, ascending."""
    seen = torch.zeros(in_features, dtype=torch.bool, device=mask.columns.device)
    seen[mask.columns.to(torch.int64)] = True
    return seen.nonzero().squeeze(1)


def slot_of(mask: Mask) -> tuple[int, str]:
    """What values on this mask stand for: (nnz, SHA-256 of its columns and row offsets)."""
    digest = hashlib.sha256()
    for tensor in mask:
        digest.update(tensor.cpu().to(torch.int64).numpy().tobytes())
    return mask.nnz, digest.hexdigest()


def problems_of(mask: Mask, values: Tensor, out_features: int, in_features: int) -> list[str]:
    """What makes (``mask``, ``values``) unfit for a weight of the given shape; empty when nothing does."""
    columns, row_offsets = mask
    found = []
    if values.ndim != 1 or columns.ndim != 1 or row_offsets.ndim != 1:
        return ["values, columns and row offsets must each have one dimension"]
    if not values.is_floating_point():
        found.append(f"values are {values.dtype}, they must be floating point")
    if columns.dtype != column_dtype(in_features):
        found.append(
            f"columns are {columns.dtype}, they must be {column_dtype(in_features)} for in_features {in_features}"
        )
    if row_offsets.dtype != torch.int32:
        found.append(f"row offsets are {row_offsets.dtype}, they must be torch.int32")
    if columns.numel() != values.numel():
        found.append(f"{columns.numel()} columns but {values.numel()} values")
    if row_offsets.numel() != out_features + 1:
        found.append(f"{row_offsets.numel()} row offsets, must be out_features + 1 = {out_features + 1}")
    if found:
        return found
    if row_offsets[0] != 0 or row_offsets[-1] != columns.numel() or (row_offsets.to(torch.int64).diff() < 0).any():
        return [f"row offsets must rise from 0 to the number of values, {columns.numel()}"]
    if mask.nnz:
        wide = columns.to(torch.int64)
        if wide.min() < 0 or wide.max() >= in_features:
            found.append(f"a column lies outside 0..{in_features - 1}")
        elif (positions(mask, in_features).diff() <= 0).any():
            found.append("columns must ascend inside each row without repeats")
        if not torch.isfinite(values).all():
            found.append("a value is NaN or infinite")
    return found
