"""How many values each matrix gets."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl_spft.errors import SpftConfigError


def total_budget(
    shapes: Sequence[tuple[int, int]],
    density: float | None = None,
    num_values: int | None = None,
    match_lora_rank: int | None = None,
) -> int:
    """The number of trained values over all matrices.

    Args:
        shapes: (out_features, in_features) of each targeted matrix.
        density: share of all entries; rounded, at least 1.
        num_values: an absolute count.
        match_lora_rank: rank r, for the sum of r (out_features + in_features).

    Raises:
        SpftConfigError: more values than there are entries.
    """
    entries = sum(out_features * in_features for out_features, in_features in shapes)
    if density is not None:
        return max(1, round(density * entries))
    if num_values is not None:
        total, key = num_values, f"num_values: {num_values}"
    else:
        total = match_lora_rank * sum(out_features + in_features for out_features, in_features in shapes)
        key = f"match_lora_rank: {match_lora_rank}"
    if total > entries:
        raise SpftConfigError(
            [f"`{key}` asks for {total:,} values, but the targeted matrices have {entries:,} entries: ask for fewer"]
        )
    return total


def layer_budgets(
    shapes: Sequence[tuple[int, int]],
    density: float | None = None,
    num_values: int | None = None,
    match_lora_rank: int | None = None,
) -> list[int]:
    """The budget of each matrix: in proportion to its entries, or as many as its own LoRA would train.

    The counts add up to `total_budget`; remainders go to the largest fractions, ties to the first matrices.
    """
    total = total_budget(shapes, density, num_values, match_lora_rank)
    sizes = [out_features * in_features for out_features, in_features in shapes]
    if match_lora_rank is not None:
        weights = [out_features + in_features for out_features, in_features in shapes]
        counts = [match_lora_rank * weight for weight in weights]
        if all(count <= size for count, size in zip(counts, sizes)):
            return counts
    counts = [total * size // sum(sizes) for size in sizes]
    remainders = [total * size % sum(sizes) for size in sizes]
    for index in sorted(range(len(sizes)), key=lambda i: -remainders[i])[: total - sum(counts)]:
        counts[index] += 1
    return counts
