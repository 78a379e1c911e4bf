"""Figures of a mask's or an adapter's matrices: coverage, concentration, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.module_types import Place, layers_in_order, places_of
from axolotl_spft.ops.mask.coverage import Coverage, MatrixReport, coverage_of, report_matrix
from axolotl_spft.ops.mask.csr import Mask, row_indices

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
# the shares of rows, or columns, at which a concentration curve is told
GRID = tuple(step / 50 for step in range(51))


class Matrix(NamedTuple):
    """One matrix of a file: its mask, its width and, in an adapter, the values (nnz) at the mask's positions."""

    name: str
    mask: Mask
    in_features: int
    values: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.out_features, self.in_features


@dataclass(frozen=True)
class Change:
    """A delta S beside its weight W, in float64.

    Attributes:
        largest: the largest |s| / |w| over the entries of S whose w is not 0; None where there is none.
        zeros: how many entries of S stand where w is 0.
        squares: the sum of W's squares.
    """

    largest: float | None
    zeros: int
    squares: float


@dataclass(frozen=True)
class MatrixFigures:
    """One matrix, measured. ``magnitudes`` (nnz; float32) are the |values|, ``rows`` and ``columns`` held shares.

    ``rows[i]`` is the share of the entries that the fullest ``GRID[i]`` of the rows holds.
    """

    report: MatrixReport
    place: Place
    rows: Tensor
    columns: Tensor
    magnitudes: Tensor | None
    change: Change | None


@dataclass(frozen=True)
class ValueFigures:
    """The values of several matrices.

    Attributes:
        zeros: how many are exactly 0.
        mean: of |value|.
        quantiles: of |value| at `QUANTILES`, interpolated linearly.
        largest_change: the largest |s| / |w| where w is not 0; None without a base.
        relative_norm: the Frobenius norm of S divided by that of W; None without a base.
    """

    zeros: int
    mean: float
    quantiles: tuple[float, ...]
    largest_change: float | None
    relative_norm: float | None


@dataclass(frozen=True)
class Figures:
    """Several matrices together; ``values`` is None for masks, and for an adapter's matrices without any entry."""

    coverage: Coverage
    top_rows: float | None
    top_columns: float | None
    values: ValueFigures | None


def measure(
    matrices: Iterable[Matrix], names: Sequence[str], weight_of: Callable[[Matrix], Tensor] | None = None
) -> Iterator[MatrixFigures]:
    """Yield the `MatrixFigures` of each matrix, one at a time.

    Args:
        names: of all matrices; types and layers are told apart by them.
        weight_of: the base's weight of a matrix, where it is known.
    """
    places = places_of(names)
    for matrix in matrices:
        mask, values = matrix.mask, matrix.values
        per_row = mask.row_offsets.diff().to(torch.int64)
        per_column = torch.bincount(mask.columns.to(torch.int64), minlength=matrix.in_features)
        yield MatrixFigures(
            report_matrix(matrix.name, mask, matrix.in_features),
            places[matrix.name],
            held_shares(per_row),
            held_shares(per_column),
            None if values is None else values.float().abs(),
            None if values is None or weight_of is None else change_of(matrix, weight_of(matrix)),
        )


def held_shares(counts: Tensor) -> Tensor:
    """The Lorenz-like curve of ``counts`` (n), fullest first: the share that each of `GRID` holds, (51) float64.

    Linear between whole rows, so that an even spread is the diagonal; zeros where nothing is counted.
    """
    total = torch.cat([torch.zeros(1, dtype=torch.float64), counts.sort(descending=True).values.double().cumsum(0)])
    at = torch.tensor(GRID, dtype=torch.float64) * counts.numel()
    low = at.floor().long().clamp(max=counts.numel() - 1)
    held = torch.lerp(total[low], total[low + 1], at - low)
    return held / total[-1] if total[-1] else held


def change_of(matrix: Matrix, weight: Tensor) -> Change:
    """The delta of ``matrix`` beside ``weight`` (out_features, in_features)."""
    rows = row_indices(matrix.mask.row_offsets, matrix.mask.nnz).long()
    at = weight[rows, matrix.mask.columns.long()].double().abs()
    known = at != 0
    ratios = matrix.values.double().abs()[known] / at[known]
    return Change(ratios.max().item() if ratios.numel() else None, int((~known).sum()), _square_sum(weight))


def _square_sum(weight: Tensor) -> float:
    return sum(rows.double().square().sum().item() for rows in weight.split(1024))


def quantiles_of(magnitudes: Tensor) -> tuple[float, ...]:
    """The quantiles of ``magnitudes`` (n > 0) at `QUANTILES`."""
    ascending = magnitudes.sort().values
    at = [quantile * (ascending.numel() - 1) for quantile in QUANTILES]
    pairs = [(ascending[int(x)].item(), ascending[min(int(x) + 1, ascending.numel() - 1)].item(), x % 1) for x in at]
    return tuple(low + part * (high - low) for low, high, part in pairs)


def figures_of(group: Sequence[MatrixFigures]) -> Figures:
    """The figures of several matrices (at least one) together."""
    coverage = coverage_of(each.report for each in group)
    rows, columns = (concentration(group, side) for side in ("rows", "columns"))
    tenth = GRID.index(0.1)
    top_rows, top_columns = (None if curve is None else curve[tenth].item() for curve in (rows, columns))
    return Figures(coverage, top_rows, top_columns, _values_of(group))


def concentration(group: Sequence[MatrixFigures], side: str) -> Tensor | None:
    """The held shares of several matrices, ``side`` rows or columns, by their entries; None where there are none."""
    nnz = sum(each.report.selected for each in group)
    if not nnz:
        return None
    return sum(each.report.selected * getattr(each, side) for each in group) / nnz


def _values_of(group: Sequence[MatrixFigures]) -> ValueFigures | None:
    if any(each.magnitudes is None for each in group):
        return None
    magnitudes = torch.cat([each.magnitudes for each in group])
    if not magnitudes.numel():
        return None
    largest = relative = None
    if all(each.change is not None for each in group):
        largest = max((each.change.largest for each in group if each.change.largest is not None), default=None)
        whole = sum(each.change.squares for each in group)
        relative = magnitudes.double().norm().item() / whole**0.5 if whole else None
    return ValueFigures(
        int((magnitudes == 0).sum()),
        magnitudes.double().mean().item(),
        quantiles_of(magnitudes),
        largest,
        relative,
    )


def by_kind(matrices: Sequence[MatrixFigures]) -> dict[str, list[MatrixFigures]]:
    """The matrices of each module type."""
    groups: dict[str, list[MatrixFigures]] = {}
    for each in matrices:
        groups.setdefault(each.place.kind, []).append(each)
    return groups


def by_layer(matrices: Sequence[MatrixFigures]) -> dict[str, list[MatrixFigures]]:
    """The matrices of each layer, in the order of layers."""
    groups: dict[str, list[MatrixFigures]] = {layer: [] for layer in layers_in_order(each.place for each in matrices)}
    for each in matrices:
        groups[each.place.layer].append(each)
    return groups
