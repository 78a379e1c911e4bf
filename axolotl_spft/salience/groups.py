"""Several passes over groups of modules, where the accumulators of all of them would take too much memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.metrics.metric import GATHERED, Metric
from axolotl_spft.salience.metrics.statistics import HESSIAN_GRADIENT, INPUT_SQUARES, SYNAPTIC_FLOW
from axolotl_spft.tuner.layer import SpftLinear


def groups_of(
    layers: Mapping[str, SpftLinear], needs: Collection[str], memory_gib: float | None
) -> list[dict[str, SpftLinear]]:
    """The layers in groups, in their order, whose float32 accumulators take at most ``memory_gib`` GiB each.

    One group where there is no limit, or nothing is accumulated. A layer that alone takes more is a group of its own.
    """
    matrices = [
        need for need in (*GATHERED, HESSIAN_GRADIENT, SYNAPTIC_FLOW) if need in needs and need != INPUT_SQUARES
    ]
    if memory_gib is None or not matrices:
        return [dict(layers)]
    groups: list[dict[str, SpftLinear]] = []
    room = 0.0
    for name, layer in layers.items():
        taken = 4 * len(matrices) * layer.out_features * layer.in_features
        if not groups or taken > room:
            groups.append({})
            room = memory_gib * 2**30
        groups[-1][name] = layer
        room -= taken
    return groups


def check_groups(config: SpftConfig, metric: Metric, groups: int) -> None:
    """Check that a mask can be chosen group by group.

    Raises:
        SpftError: it needs the scores of all matrices at once.
    """
    problem = None
    if config.scope == "global":
        problem = "`scope: global` compares the scores of all matrices: write `scope: layer` or `scope: row`"
    elif config.block is not None:
        problem = "`pattern: block` hands what a matrix leaves on to the next: write `pattern: element`"
    elif metric.needs & {HESSIAN_GRADIENT, SYNAPTIC_FLOW}:
        problem = f"`salience: {metric.name}` looks at all matrices at once: use another salience"
    if problem:
        raise SpftError(
            f"`salience_memory_gib: {config.salience_memory_gib}` would take {groups} passes, but {problem}, or allow "
            "more memory (without the key, accumulators that do not fit on the device are kept on the host)"
        )
