"""Several passes over groups of modules, where the accumulators of all of them would take too much memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.collect import devices_of
from axolotl_spft.salience.metrics.metric import OF_ALL_MATRICES, Metric, accumulators_of
from axolotl_spft.tuner.sparse_layer import SparseLayer


def groups_of(
    layers: Mapping[str, SparseLayer], needs: Collection[str], memory_gib: float | None
) -> list[dict[str, SparseLayer]]:
    """The layers in groups, in their order, whose float32 accumulators take at most ``memory_gib`` GiB each.

    One group where there is no limit, or nothing is accumulated. A layer that alone takes more is a group of its own.
    """
    accumulators = accumulators_of(needs)
    if memory_gib is None or not accumulators:
        return [dict(layers)]
    groups: list[dict[str, SparseLayer]] = []
    room = 0.0
    for name, layer in layers.items():
        taken = 4 * accumulators * layer.out_features * layer.in_features
        if not groups or taken > room:
            groups.append({})
            room = memory_gib * 2**30
        groups[-1][name] = layer
        room -= taken
    return groups


def why_at_once(scope: str, pattern: str, metric: Metric) -> str | None:
    """Why a mask cannot be chosen group by group, and what to write instead; None where it can."""
    if metric.needs & OF_ALL_MATRICES:
        return f"`salience: {metric.name}` looks at all matrices at once: use another salience"
    if scope == "global":
        return "`scope: global` compares the scores of all matrices: write `scope: layer` or `scope: row`"
    if pattern == "block":
        return "`pattern: block` hands what a matrix leaves on to the next: write `pattern: element`"
    return None


def may_move_to_host(config: SpftConfig, metric: Metric, layers: Mapping[str, SparseLayer]) -> bool:
    """Whether accumulators that must be there all at once have another place than the memory that is limited."""
    at_once = why_at_once(config.scope, config.pattern, metric) is not None
    on_gpus = all(device.type == "cuda" for device in devices_of(layers))
    return at_once and on_gpus and not metric.needs & OF_ALL_MATRICES


def check_groups(config: SpftConfig, metric: Metric, groups: int) -> None:
    """Check that a mask can be chosen group by group.

    Raises:
        SpftError: it needs the scores of all matrices at once.
    """
    problem = why_at_once(config.scope, config.pattern, metric)
    if problem:
        raise SpftError(
            f"`salience_memory_gib: {config.salience_memory_gib}` would take {groups} passes, but {problem}, or allow "
            "more memory (without the key, accumulators that do not fit on the device are kept on the host)"
        )
