"""From scores to masks: which positions of each matrix are trained, by scope and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.select import Shape, top_k, top_k_per_row


def choose_positions(
    config: SpftConfig, shapes: Sequence[Shape], score_of: Callable[[int], Tensor], ranks: Ranks
) -> list[Tensor]:
    """The positions that the config's scope and budget give each matrix.

    Args:
        shapes: (out_features, in_features) of each matrix.
        score_of: gives this rank's rows of the scores of the matrix of an index, float32 and finite; it may be called
            several times for each.

    Returns:
        For each matrix row * in_features + column: int64, ascending; the same on every rank.
    """
    budget = (config.density, config.num_values, config.match_lora_rank)
    if config.scope == "global":
        return top_k(score_of, shapes, total_budget(shapes, *budget), ranks)
    chosen = []
    for index, (shape, count) in enumerate(zip(shapes, layer_budgets(shapes, *budget))):
        scores = score_of(index)
        if config.scope == "row":
            chosen.append(top_k_per_row(scores, shape, count, ranks))
        else:
            chosen.extend(top_k(lambda _, scores=scores: scores, [shape], count, ranks))
    return chosen
