"""The masks that an adapter's config asks for, computed from the model and its sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from axolotl_spft.budget import layer_budgets
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions
from axolotl_spft.salience.choose import choose_in_matrix, choose_positions
from axolotl_spft.salience.collect import probed_outputs
from axolotl_spft.salience.examples import Batch
from axolotl_spft.salience.groups import check_groups, groups_of, may_move_to_host
from axolotl_spft.salience.metrics.metric import Metric, load_metric
from axolotl_spft.salience.metrics.statistics import INPUT_SQUARES
from axolotl_spft.salience.out_of_memory import named_out_of_memory
from axolotl_spft.salience.repair import Repair
from axolotl_spft.salience.sample_pass import collect_statistics, unreached_by_sample
from axolotl_spft.salience.scores import check_base, scorer
from axolotl_spft.salience.untouched import untouched_rng
from axolotl_spft.salience.untrained import (
    frozen_by_the_run,
    idle_experts,
    never_called,
    notes_on,
    notes_on_idle,
    unreached_by,
)
from axolotl_spft.salience.warm_up import check_warm_up, repeatable, warmed_up, weight_with_values
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of


class Computed(NamedTuple):
    """What was computed.

    Attributes:
        masks: by the names of the layers.
        record: what the mask's record says of the pass.
        notes: sentences about what gets nothing.
        untrained: the names of the layers that get nothing because no step could train them.
    """

    masks: dict[str, Mask]
    record: dict
    notes: list[str]
    untrained: list[str]


def compute_masks(
    model: nn.Module,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    adapter_name: str,
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    ranks: Ranks,
    learning_rate: float | None = None,
    repair: Repair | None = None,
) -> Computed:
    """The masks of the config's salience, scope and budget, of those layers that can be trained.

    ``repair`` has its share of them, and keeps what the values of a repaired matrix begin at.

    Raises:
        SpftError: as `select_mask`.
    """
    metric = load_metric(config.salience)
    check_base(metric, layers)
    frozen = frozen_by_the_run(layers, adapter_name)
    with ExitStack() as stack:
        read_weight = SparseLayer.read_weight
        if config.score_after:
            check_warm_up(model, metric, config.score_after, batches, learning_rate)
            batches = repeatable(batches)
            dead = {*frozen, *never_called(model, layers)}
            able = [name not in dead for name in layers]
            stack.enter_context(named_out_of_memory(ranks))
            stack.enter_context(
                warmed_up(model, config, layers, adapter_name, batches, loss_fn, learning_rate, able, ranks)
            )
            read_weight = partial(weight_with_values, adapter_name=adapter_name)
        return _scored(model, config, layers, metric, frozen, batches, loss_fn, ranks, read_weight, repair)


def _scored(
    model: nn.Module,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    metric: Metric,
    frozen: list[str],
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    ranks: Ranks,
    read_weight: Callable[[SparseLayer], Tensor],
    repair: Repair | None,
) -> Computed:
    memory_gib = config.salience_memory_gib
    groups = groups_of(layers, metric.needs, memory_gib)
    if len(groups) > 1 and not may_move_to_host(config, metric, layers):
        check_groups(config, metric, len(groups))
        return _scored_in_groups(
            model,
            config,
            layers,
            groups,
            metric,
            frozen,
            repeatable(batches or ()),
            loss_fn,
            ranks,
            read_weight,
            repair,
        )
    needs = _needs(metric, repair)
    if batches is not None and needs == {INPUT_SQUARES}:
        # which the inputs are read of first, and then what reaches the matrices
        batches = repeatable(batches)
    with named_out_of_memory(ranks):
        found = collect_statistics(model, layers, needs, batches, loss_fn, config.samples, ranks, memory_gib)
        # of what reads inputs or weights alone the sums tell nothing
        tell = {need: sums for need, sums in found.sums.items() if need != INPUT_SQUARES}
        unreached = unreached_by(tell, ranks) if tell else never_called(model, layers)
        if batches is not None and not tell:
            by_sample = unreached_by_sample(model, layers, batches, loss_fn, config.samples, ranks)
            unreached = [name for name in layers if name in {*unreached, *by_sample}]
        idle = idle_experts(layers, tell, ranks)
    untrained = [name for name in layers if name in {*frozen, *unreached}]
    score_of = scorer(metric, layers, found.sums, ranks, config.seed or 0, config.lift_rank, read_weight)
    shapes = list(shapes_of(layers).values())
    if repair is not None:
        repair.squares = found.sums[INPUT_SQUARES]
    # a function of the user's own may draw numbers
    with untouched_rng():
        chosen = choose_positions(
            config, list(layers), shapes, score_of, ranks, [name not in untrained for name in layers], repair
        )
    masks = {name: mask_from_positions(positions, *shape) for name, positions, shape in zip(layers, chosen, shapes)}
    notes = [*notes_on(unreached, frozen), *notes_on_idle(layers, idle)]
    return Computed(masks, {"samples": found.read, **found.notes}, notes, untrained)


def _needs(metric: Metric, repair: Repair | None) -> frozenset[str]:
    return metric.needs if repair is None else metric.needs | {INPUT_SQUARES}


def _scored_in_groups(
    model: nn.Module,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    groups: list[dict[str, SparseLayer]],
    metric: Metric,
    frozen: list[str],
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    ranks: Ranks,
    read_weight: Callable[[SparseLayer], Tensor],
    repair: Repair | None,
) -> Computed:
    """The same masks from a pass over the same batches for each group, of which one has sums at a time."""
    names, shapes, needs = list(layers), shapes_of(layers), _needs(metric, repair)
    unreached: list[str] = []
    while True:
        untrained = {*frozen, *unreached}
        able = [name not in untrained for name in names]
        counts = dict(zip(names, layer_budgets(list(shapes.values()), **config.budget(names), trainable=able)))
        masks, found_unreached, idle = {}, [], {}
        for group in groups:
            found = None  # before the next sums are made
            # so that the pass is the same one, and there is one where no gradient reaches the group
            others = [layer for name, layer in layers.items() if name not in group]
            with named_out_of_memory(ranks), probed_outputs(others):
                found = collect_statistics(
                    model, group, needs, batches, loss_fn, config.samples, ranks, config.salience_memory_gib
                )
            if repair is not None:
                repair.squares = found.sums[INPUT_SQUARES]
            tell = {need: sums for need, sums in found.sums.items() if need != INPUT_SQUARES}
            found_unreached += unreached_by(tell, ranks)
            idle |= idle_experts(layers, tell, ranks)
            score_of = scorer(metric, layers, found.sums, ranks, config.seed or 0, config.lift_rank, read_weight)
            with untouched_rng():
                for name in group:
                    score = partial(score_of, names.index(name))
                    at = choose_in_matrix(config.scope, name, shapes[name], counts[name], score, ranks, repair)
                    masks[name] = mask_from_positions(at, *shapes[name])
            del score_of, score
        if found_unreached == unreached:
            break
        # the budget of what turns out to get nothing goes to matrices that have been chosen in already
        unreached = found_unreached
    record = {"samples": found.read, **found.notes}
    notes = [*notes_on(unreached, frozen), *notes_on_idle(layers, idle)]
    return Computed(masks, record, notes, [name for name in names if name in untrained])
