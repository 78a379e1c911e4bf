"""Matrices that no step of the run can train, which would only waste their share of the budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import first_of
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.salience.metrics.statistics import GRADIENT
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.sparse_layer import SparseLayer

_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")
# as architectures name what looks at pictures and sound, and what passes that on to the text
_TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_modal|multimodal|mm)([._]|$)")


def frozen_by_the_run(layers: Mapping[str, SparseLayer], adapter_name: str) -> list[str]:
    """The layers whose values do not require a gradient, where those of others do: the run froze them.

    Of an adapter that is not trained at all (now) there are none.
    """
    frozen = [name for name, layer in layers.items() if not layer.spft_values[adapter_name].requires_grad]
    return [] if len(frozen) == len(layers) else frozen


def never_called(model: nn.Module, layers: Mapping[str, SparseLayer]) -> list[str]:
    """The layers that torch's attention reads the weight of, without calling them."""
    read = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    return [name for name, layer in layers.items() if id(layer) in read]


def unreached_by(sums: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> list[str]:
    """The layers of which all sums of the pass (need -> name -> this rank's part) are 0 on every rank."""
    names = list(dict.fromkeys(name for of_layers in sums.values() for name in of_layers))
    reached = ranks.sum_numbers(
        *(int(any(of_layers[name].any() for of_layers in sums.values() if name in of_layers)) for name in names)
    )
    return [name for name, count in zip(names, reached) if not count]


def idle_experts(
    layers: Mapping[str, SparseLayer], sums: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> dict[str, int]:
    """How many experts of each matrix of several no gradient reached, where it reached others; all ranks must ask.

    Args:
        sums: as of `unreached_by`.
    """
    idle = {}
    for name, total in sums.get(GRADIENT, {}).items():
        layer = layers[name]
        if isinstance(layer, ExpertMatrix):
            reached = torch.zeros(layer.out_features, device=total.device)
            reached[ranks.rows(layer.out_features)] = total.any(1).to(reached.dtype)
            count = int((ranks.sum_(reached).view(layer.n_experts, -1).sum(1) == 0).sum())
            if 0 < count < layer.n_experts:
                idle[name] = count
    return idle


def notes_on_idle(layers: Mapping[str, SparseLayer], idle: Mapping[str, int]) -> list[str]:
    """What the report says of `idle_experts`."""
    if not idle:
        return []
    each = [f"{count} of the {layers[name].n_experts} experts in {name}" for name, count in idle.items()]
    return [
        f"no token of the sample came to {first_of(each, ', ')}, so no gradient says which of their weights matter "
        "(with `scope: row` they have values all the same): more `samples` may reach them"
    ]


def notes_on(unreached: Iterable[str], frozen: Iterable[str]) -> list[str]:
    """What the report says of layers that get no values: which, why, and what to do.

    Args:
        unreached: names of layers that no gradient reached on the sample.
        frozen: names of those that the run freezes.
    """
    frozen = list(frozen)
    unreached = [name for name in unreached if name not in frozen]
    if not frozen and not unreached:
        return []
    notes = []
    if unreached:
        kinds: tuple[tuple[Callable[[str], bool], str], ...] = (
            (_is_expert, "experts that no token came to may need more `samples`"),
            (
                _is_tower,
                "a sample of text alone reaches no tower for pictures or sound: name its modules in `exclude_modules`, "
                "or train on data that has them",
            ),
            (
                lambda name: not _is_expert(name) and not _is_tower(name),
                "name modules whose weights are read without calling them (nn.MultiheadAttention's out_proj, Mamba's "
                "dt_proj, a head under a fused loss), and those whose output nothing reads (a pooler), in "
                "`exclude_modules`",
            ),
        )
        remedies = [remedy for is_kind, remedy in kinds if any(map(is_kind, unreached))]
        notes.append(
            f"no gradient reached {first_of(unreached, ', ')} on the sample, so nothing of them is trained and their "
            f"share went to the others: {'; '.join(remedies)}"
        )
    if frozen:
        notes.append(
            f"the run freezes {first_of(frozen, ', ')} (`freeze_mm_modules`, or requires_grad), so nothing of them is "
            "trained and their share went to the others: name them in `exclude_modules`, or let them be trained"
        )
    return notes


def note_on_frozen(masks: Mapping[str, Mask], frozen: Iterable[str], origin: str) -> list[str]:
    """What the report says of a mask from a file that has values in layers that the run freezes.

    Args:
        origin: the file.
    """
    wasted = {name: masks[name].nnz for name in frozen if masks[name].nnz}
    if not wasted:
        return []
    return [
        f"{sum(wasted.values()):,} of the values of the mask in {origin} lie in {first_of(list(wasted), ', ')}, which "
        "the run freezes (`freeze_mm_modules`, or requires_grad), so nothing trains them: name another `mask_path` to "
        "compute the mask anew, or let them be trained"
    ]


def _is_expert(name: str) -> bool:
    return bool(_EXPERT.search(name))


def _is_tower(name: str) -> bool:
    return bool(_TOWER.search(name)) and not _is_expert(name)
