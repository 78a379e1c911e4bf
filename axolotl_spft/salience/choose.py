"""From scores to masks: which positions of each matrix are trained, by scope, pattern and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from axolotl_spft.budget import check_room, has_own_density, layer_budgets, share_bounds, total_budget
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftConfigError
from axolotl_spft.salience.blocks import block_entries, block_scores, top_blocks
from axolotl_spft.salience.bounded import bounded_counts
from axolotl_spft.salience.select import Shape, top_k, top_k_per_row


def choose_positions(
    config: SpftConfig,
    names: Sequence[str],
    shapes: Sequence[Shape],
    score_of: Callable[[int], Tensor],
    ranks: Ranks,
    trainable: Sequence[bool] | None = None,
) -> list[Tensor]:
    """The positions that the config's scope, pattern and budget give each matrix; `axolotl_spft.budget` says how many.

    Args:
        names: of the matrices.
        shapes: (out_features, in_features) of each matrix.
        score_of: gives this rank's rows of the scores of the matrix of an index, float32 and finite; it may be called
            several times for each.
        ranks: the processes that share the rows.
        trainable: whether each matrix can be trained at all; all by default. The others get nothing.

    Returns:
        For each matrix row * in_features + column: int64, ascending; the same on every rank.

    Raises:
        SpftConfigError: the budget cannot be placed.
    """
    trainable = [True] * len(shapes) if trainable is None else list(trainable)
    if config.block is not None:
        return _blocks(config, names, shapes, score_of, ranks, trainable)
    if config.scope == "global":
        fewest, most = _bounds(config, names, shapes, trainable)
        total = total_budget(shapes, **config.budget(names))
        if not any(fewest) and most == [out_features * in_features for out_features, in_features in shapes]:
            return top_k(score_of, shapes, total, ranks)
        counts = bounded_counts(score_of, fewest, most, total, ranks)
    else:
        counts = layer_budgets(shapes, **config.budget(names), trainable=trainable)
    return [
        choose_in_matrix(config.scope, shape, count, lambda index=index: score_of(index), ranks)
        for index, (shape, count) in enumerate(zip(shapes, counts))
    ]


def choose_in_matrix(scope: str, shape: Shape, count: int, score: Callable[[], Tensor], ranks: Ranks) -> Tensor:
    """The ``count`` positions of one matrix, whose scores are asked for only where there are any."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    scores = score()
    if scope == "row":
        return top_k_per_row(scores, shape, count, ranks)
    return top_k(lambda _: scores, [shape], count, ranks)[0]


def _bounds(
    config: SpftConfig, names: Sequence[str], shapes: Sequence[Shape], trainable: list[bool]
) -> tuple[list[int], list[int]]:
    """The fewest and the most values of each matrix under global scope."""
    total = total_budget(shapes, **config.budget(names))
    check_room(shapes, total, trainable)
    counts = layer_budgets(shapes, **config.budget(names), trainable=trainable)
    # whose counts are theirs, whatever the others' scores are
    own = has_own_density(names, config.density_pattern)
    fixed = sum(count for count, is_own in zip(counts, own) if is_own)
    competing = [able and not is_own for able, is_own in zip(trainable, own)]
    fewest, most = share_bounds(shapes, total - fixed, config.min_density, config.max_density, competing)
    return (
        [count if is_own else bound for count, is_own, bound in zip(counts, own, fewest)],
        [count if is_own else bound for count, is_own, bound in zip(counts, own, most)],
    )


def _blocks(
    config: SpftConfig,
    names: Sequence[str],
    shapes: Sequence[Shape],
    score_of: Callable[[int], Tensor],
    ranks: Ranks,
    trainable: list[bool],
) -> list[Tensor]:
    block = config.block
    sums = [
        block_scores(score_of(index), shape, block, ranks) if able else torch.zeros(())
        for index, (shape, able) in enumerate(zip(shapes, trainable))
    ]
    total = total_budget(shapes, **config.budget(names))
    if config.scope == "global":
        fewest, most = _bounds(config, names, shapes, trainable)
        counts = bounded_counts(
            lambda index: sums[index],
            fewest,
            most,
            total,
            weight_of=lambda index: block_entries(shapes[index], block) if trainable[index] else torch.zeros(()).long(),
        )
    else:
        counts = layer_budgets(shapes, **config.budget(names), trainable=trainable)
    chosen, left = [], 0
    for index, (shape, count) in enumerate(zip(shapes, counts)):
        if not trainable[index]:
            chosen.append(torch.empty(0, dtype=torch.int64))
            continue
        count += left if config.scope == "layer" else 0
        chosen.append(top_blocks(sums[index], shape, block, count))
        left = count - chosen[-1].numel()
    if not any(map(len, chosen)):
        raise SpftConfigError(
            [
                f"the budget of {total:,} values holds no whole block of `block_size: {list(block)}`: ask for more "
                "values, or smaller blocks"
            ]
        )
    return chosen
