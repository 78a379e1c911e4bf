"""How many values each matrix gets.

The exact statement of how counts are rounded, with n_i the entries of matrix i:

- **Total.** ``num_values`` and ``match_lora_rank`` (the sum of r (out_features + in_features)) are counts already;
  ``density`` d gives round(d sum n_i), half to even, and at least 1. Every key of ``density_pattern`` takes the
  matrices out whose names it matches first, and gives them together round(d_key sum n_i), at least 1; `density` and
  ``match_lora_rank`` then count over the others alone, and the total is the sum. ``num_values`` stays the total.
- **Layer and row scope.** Each of these sums is shared in proportion to n_i (for ``match_lora_rank`` to out_features +
  in_features, where the matrices are large enough): rounded down, and what is left goes to the largest remainders, one
  value each, ties to the first matrices. So counts add up to the total exactly.
- **Global scope.** The total itself is selected; ``min_density`` keeps each matrix at floor(min n_i) or more,
  ``max_density`` at ceil(max n_i) or fewer, so that bounds around the density can always be kept. Matrices of
  ``density_pattern`` get their counts as under layer scope and do not compete.
- **Repair** takes floor(repair c_i) of the values of a matrix first, with c_i its count under layer scope; under global
  scope moved into its bounds.
- **Matrices that cannot be trained** (no gradient reaches them) get 0. What they would have got goes to the others
  that no key of ``density_pattern`` names, or to all where there are none; the total stays.
- **Blocks.** Counts are of entries as above. A matrix takes its blocks from the highest score on while the next one
  fits into its count, and what is left of that goes on to the next matrix (under global scope without bounds: the
  highest blocks of all matrices are taken while the next one fits). So nnz is never above the budget, and below it by
  less than one block; with bounds or ``density_pattern`` under global scope by less than one block in each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from peft.utils.other import get_pattern_key

from axolotl_spft.errors import SpftConfigError, first_of

Shape = tuple[int, int]


def total_budget(
    shapes: Sequence[Shape],
    density: float | None = None,
    num_values: int | None = None,
    match_lora_rank: int | None = None,
    density_pattern: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
) -> int:
    """The number of trained values over all matrices.

    Args:
        shapes: (out_features, in_features) of each targeted matrix.
        density: share of all entries; rounded, at least 1.
        num_values: an absolute count.
        match_lora_rank: rank r, for the sum of r (out_features + in_features).
        density_pattern: {regular expression of names' endings: density of these matrices}, matched as PEFT's
            ``rank_pattern``; the first key that matches counts.
        names: of the matrices; read where there is a ``density_pattern``.

    Raises:
        SpftConfigError: more values than there are entries, or a key of ``density_pattern`` that matches nothing.
    """
    named = _matched(names, density_pattern)
    of_patterns = sum(
        _rounded(density_pattern[key], sum(_entries(shapes[i]) for i in indices)) for key, indices in named.items()
    )
    others = _others(shapes, named)
    entries = sum(_entries(shapes[i]) for i in others)
    if density is not None:
        return of_patterns + (_rounded(density, entries) if others else 0)
    if num_values is not None:
        asked, key = num_values - of_patterns, f"num_values: {num_values}"
    else:
        asked = match_lora_rank * sum(sum(shapes[i]) for i in others)
        key = f"match_lora_rank: {match_lora_rank}"
    if asked > entries or asked < 0:
        among = f", {of_patterns:,} of them by `density_pattern`" if named else ""
        raise SpftConfigError(
            [
                f"`{key}` asks for {asked + of_patterns:,} values{among}, but the "
                f"{'other ' if named else ''}targeted matrices have {entries:,} entries: ask for "
                f"{'fewer' if asked > entries else 'more, or lower the densities of the pattern'}"
            ]
        )
    return of_patterns + asked


def layer_budgets(
    shapes: Sequence[Shape],
    density: float | None = None,
    num_values: int | None = None,
    match_lora_rank: int | None = None,
    density_pattern: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
    trainable: Sequence[bool] | None = None,
) -> list[int]:
    """The budget of each matrix: in proportion to its entries, or as many as its own LoRA would train.

    The counts add up to `total_budget`; see the module for how they are rounded.

    Args:
        shapes, density, num_values, match_lora_rank, density_pattern, names: as of `total_budget`.
        trainable: whether each matrix can be trained at all; all by default. The others get 0.

    Raises:
        SpftConfigError: as `total_budget`, or the trainable matrices have fewer entries than the budget.
    """
    total = total_budget(shapes, density, num_values, match_lora_rank, density_pattern, names)
    trainable = [True] * len(shapes) if trainable is None else trainable
    check_room(shapes, total, trainable)
    sizes = [_entries(shape) if able else 0 for shape, able in zip(shapes, trainable)]
    counts = [0] * len(shapes)
    named = _matched(names, density_pattern)
    for key, indices in named.items():
        room = [sizes[i] for i in indices]
        if any(room):
            for index, count in zip(indices, _spread(_rounded(density_pattern[key], sum(room)), room)):
                counts[index] = count
    others = [i for i in _others(shapes, named) if sizes[i]]
    rest = total - sum(counts)
    room = [sizes[i] for i in others]
    if rest > sum(room):
        # what matrices that cannot be trained leave is more than the others hold: to those of the pattern as well
        free = [size - count for size, count in zip(sizes, counts)]
        return [count + more for count, more in zip(counts, _spread(rest, free))]
    shared = None
    if match_lora_rank is not None:
        shared = _spread(rest, [sum(shapes[i]) for i in others])
    if shared is None or any(count > size for count, size in zip(shared, room)):
        shared = _spread(rest, room)
    for index, count in zip(others, shared):
        counts[index] = count
    return counts


def share_bounds(
    shapes: Sequence[Shape],
    total: int,
    min_density: float | None = None,
    max_density: float | None = None,
    trainable: Sequence[bool] | None = None,
) -> tuple[list[int], list[int]]:
    """The fewest and the most values of each matrix under a global top-k: floor(min n_i) and ceil(max n_i).

    Raises:
        SpftConfigError: ``total`` values cannot be placed within them.
    """
    trainable = [True] * len(shapes) if trainable is None else trainable
    sizes = [_entries(shape) if able else 0 for shape, able in zip(shapes, trainable)]
    fewest = [math.floor(_exact(min_density or 0) * size) for size in sizes]
    most = [math.ceil(_exact(1 if max_density is None else max_density) * size) for size in sizes]
    if not sum(fewest) <= total <= sum(most):
        name, bound, limit, change = (
            ("min_density", min_density, sum(fewest), "lower")
            if total < sum(fewest)
            else ("max_density", max_density, sum(most), "raise")
        )
        raise SpftConfigError(
            [
                f"`{name}: {bound}` cannot be kept: it allows {'no fewer' if change == 'lower' else 'no more'} than "
                f"{limit:,} values where {total:,} are to be placed: {change} it, or change the budget "
                "(matrices that no gradient reaches get nothing)"
            ]
        )
    return fewest, most


def within_bounds(counts: Sequence[int], fewest: Sequence[int], most: Sequence[int]) -> list[int]:
    """``counts`` moved into bounds that a selection of as many keeps, with a sum of no more than theirs.

    What the bounds add to some is taken off the others above their fewest, in proportion to how far they are.
    """
    moved = [min(max(count, low), high) for count, low, high in zip(counts, fewest, most)]
    excess = max(0, sum(moved) - sum(counts))
    taken = _spread(excess, [count - low for count, low in zip(moved, fewest)])
    return [count - less for count, less in zip(moved, taken)]


def check_room(shapes: Sequence[Shape], total: int, trainable: Sequence[bool]) -> None:
    """Check that the matrices that can be trained hold ``total`` values.

    Raises:
        SpftConfigError: they do not.
    """
    room = sum(_entries(shape) for shape, able in zip(shapes, trainable) if able)
    if total > room:
        raise SpftConfigError(
            [
                f"the budget of {total:,} values is more than the {room:,} entries of the matrices that can be "
                "trained, as no gradient reaches the others: lower it, or name those in `exclude_modules`"
            ]
        )


def missing_allowed(shapes: Sequence[Shape], block: Shape | None, scope: str, bounded: bool) -> int:
    """By how many values at most a mask may lie below its budget, which whole blocks need not meet exactly.

    Args:
        shapes: of the matrices.
        block: (rows, columns) of the blocks, or None for single entries.
        scope: layer or global.
        bounded: whether matrices have bounds or counts of their own.
    """
    if block is None:
        return 0
    left = [min(block[0], out_features) * min(block[1], in_features) - 1 for out_features, in_features in shapes]
    return sum(left) if scope == "global" and bounded else max(left)


def has_own_density(names: Sequence[str], density_pattern: Mapping[str, float] | None) -> list[bool]:
    """Whether a key of ``density_pattern`` names each matrix."""
    own = {index for indices in _matched(names, density_pattern).values() for index in indices}
    return [index in own for index in range(len(names))]


def _entries(shape: Shape) -> int:
    return shape[0] * shape[1]


def _exact(density: float) -> Fraction:
    """The decimal number that was written, not the binary one next to it."""
    return Fraction(str(density))


def _rounded(density: float, entries: int) -> int:
    return max(1, round(density * entries))


def _matched(names: Sequence[str], density_pattern: Mapping[str, float] | None) -> dict[str, list[int]]:
    """The matrices of each key."""
    matched: dict[str, list[int]] = {key: [] for key in density_pattern or ()}
    for index, name in enumerate(names):
        # the name itself where no key matches
        matched.get(get_pattern_key(list(matched), name), []).append(index)
    unused = [key for key, indices in matched.items() if not indices]
    if unused:
        raise SpftConfigError(
            [
                f"`density_pattern` has {first_of([f'`{key}`' for key in unused], ', ')}, which match no targeted "
                f"module that an earlier key has not taken: they must match the endings of names such as "
                f"{names[-1] if names else 'layers.0.mlp.down_proj'}"
            ]
        )
    return matched


def _others(shapes: Sequence[Shape], named: Mapping[str, list[int]]) -> list[int]:
    taken = {index for indices in named.values() for index in indices}
    return [index for index in range(len(shapes)) if index not in taken]


def _spread(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` in proportion to ``weights``; remainders go to the largest fractions, ties to the first."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    counts = [total * weight // whole for weight in weights]
    fractions = [total * weight % whole for weight in weights]
    for index in sorted(range(len(weights)), key=lambda i: -fractions[i])[: total - sum(counts)]:
        counts[index] += 1
    return counts
