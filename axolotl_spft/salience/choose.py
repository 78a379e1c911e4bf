"""From scores to masks: which positions of each matrix are trained, by scope, pattern and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from axolotl_spft.budget import check_room, has_own_density, layer_budgets, share_bounds, total_budget, within_bounds
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftConfigError
from axolotl_spft.salience.blocks import block_entries, block_scores, top_blocks
from axolotl_spft.salience.bounded import bounded_counts
from axolotl_spft.salience.repair import Repair
from axolotl_spft.salience.select import Shape, top_k, top_k_per_row


def choose_positions(
    config: SpftConfig,
    names: Sequence[str],
    shapes: Sequence[Shape],
    score_of: Callable[[int], Tensor],
    ranks: Ranks,
    trainable: Sequence[bool] | None = None,
    repair: Repair | None = None,
) -> list[Tensor]:
    """The positions that the config's scope, pattern and budget give each matrix; `axolotl_spft.budget` says how many.

    Args:
        names: of the matrices.
        shapes: (out_features, in_features) of each matrix.
        score_of: gives this rank's rows of the scores of the matrix of an index, float32 and finite; it may be called
            several times for each.
        ranks: the processes that share the rows.
        trainable: whether each matrix can be trained at all; all by default. The others get nothing.
        repair: takes its share of the values of each matrix, and keeps what these begin at.

    Returns:
        For each matrix row * in_features + column: int64, ascending; the same on every rank.

    Raises:
        SpftConfigError: the budget cannot be placed.
    """
    trainable = [True] * len(shapes) if trainable is None else list(trainable)
    if config.block is not None:
        return _blocks(config, names, shapes, score_of, ranks, trainable)
    if repair is not None and config.scope == "global":
        return _global_beside_repair(config, names, shapes, score_of, ranks, trainable, repair)
    if config.scope == "global":
        fewest, most = _bounds(config, names, shapes, trainable)
        total = total_budget(shapes, **config.budget(names))
        if not any(fewest) and most == [out_features * in_features for out_features, in_features in shapes]:
            return top_k(score_of, shapes, total, ranks)
        counts = bounded_counts(score_of, fewest, most, total, ranks)
    else:
        counts = layer_budgets(shapes, **config.budget(names), trainable=trainable)
    return [
        choose_in_matrix(config.scope, name, shape, count, lambda index=index: score_of(index), ranks, repair)
        for index, (name, shape, count) in enumerate(zip(names, shapes, counts))
    ]


def choose_in_matrix(
    scope: str,
    name: str,
    shape: Shape,
    count: int,
    score: Callable[[], Tensor],
    ranks: Ranks,
    repair: Repair | None = None,
) -> Tensor:
    """The ``count`` positions of one matrix, whose scores are asked for only where there are any."""
    if repair is None:
        return _highest(scope, shape, count, score, ranks)
    chosen = repaired = _repaired(scope, name, shape, count, ranks, repair)
    if len(repaired) < count:
        with _set_aside(score(), repaired, shape, ranks) as scores:
            others = _highest(scope, shape, count - len(repaired), lambda: scores, ranks).cpu()
        chosen = torch.cat([repaired, others]).sort().values
    repair.keep(name, chosen)
    return chosen


def _highest(scope: str, shape: Shape, count: int, score: Callable[[], Tensor], ranks: Ranks) -> Tensor:
    if not count:
        return torch.empty(0, dtype=torch.int64)
    scores = score()
    if scope == "row":
        return top_k_per_row(scores, shape, count, ranks)
    return top_k(lambda _: scores, [shape], count, ranks)[0]


def _repaired(scope: str, name: str, shape: Shape, count: int, ranks: Ranks, repair: Repair) -> Tensor:
    return _highest(scope, shape, repair.count(name, count), lambda: repair.scores(name), ranks).cpu()


@contextmanager
def _set_aside(scores: Tensor, taken: Tensor, shape: Shape, ranks: Ranks) -> Iterator[Tensor]:
    """Within the block the scores of positions that are taken already are below all others.

    They are put back, since a score may be the pass's own sum.
    """
    scores = scores.contiguous()
    flat, at = scores.view(-1), ranks.own_positions(taken, shape).to(scores.device)
    before = flat[at]
    flat[at] = -torch.inf
    try:
        yield scores
    finally:
        flat[at] = before


def _global_beside_repair(
    config: SpftConfig,
    names: Sequence[str],
    shapes: Sequence[Shape],
    score_of: Callable[[int], Tensor],
    ranks: Ranks,
    trainable: list[bool],
    repair: Repair,
) -> list[Tensor]:
    """Repair has its share of what each matrix would have under scope layer; the rest compete over all matrices."""
    fewest, most = _bounds(config, names, shapes, trainable)
    counts = within_bounds(layer_budgets(shapes, **config.budget(names), trainable=trainable), fewest, most)
    repaired = [
        _repaired("layer", name, shape, count, ranks, repair) for name, shape, count in zip(names, shapes, counts)
    ]
    held = [len(each) for each in repaired]

    def score(index: int) -> Tensor:
        scores = score_of(index).clone(memory_format=torch.contiguous_format)
        scores.view(-1)[ranks.own_positions(repaired[index], shapes[index]).to(scores.device)] = -torch.inf
        return scores

    counts = bounded_counts(
        score,
        [max(0, bound - own) for bound, own in zip(fewest, held)],
        [max(0, bound - own) for bound, own in zip(most, held)],
        total_budget(shapes, **config.budget(names)) - sum(held),
        ranks,
    )
    chosen = []
    for index, (name, shape) in enumerate(zip(names, shapes)):
        others = _highest("layer", shape, counts[index], lambda index=index: score(index), ranks).cpu()
        chosen.append(torch.cat([repaired[index], others]).sort().values)
        repair.keep(name, chosen[-1])
    return chosen


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
