"""The scores of the matrices that are targeted, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks, on_every_rank
from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.salience.adders import embedding_of
from axolotl_spft.salience.collect import device_of
from axolotl_spft.salience.metrics.metric import OF_PRODUCTS, OF_WEIGHT, Metric, problem_with_experts
from axolotl_spft.salience.metrics.statistics import Statistics
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of


def check_base(metric: Metric, layers: Mapping[str, SparseLayer]) -> None:
    """Check that the layers can give what the metric needs, before the pass.

    Raises:
        SpftError: it reads weights, and these cannot be read; or what experts or embeddings do not have.
    """
    unreadable = [name for name, layer in layers.items() if layer.forward_only]
    if metric.needs & OF_WEIGHT and unreadable:
        kind = layers[unreadable[0]].quantization_backend.backend_name
        raise SpftError(
            f"`salience: {metric.name}` reads the weights, and a {kind} layer's cannot be read "
            f"({first_of(unreadable, ', ')}): use `salience: gradient`, or a base that is not quantized by {kind}"
        )
    experts = [name for name, layer in layers.items() if isinstance(layer, ExpertMatrix)]
    problem = problem_with_experts(metric, first_of(experts, ", ")) if experts else None
    if problem:
        raise SpftError(problem)
    embeddings = [name for name, layer in layers.items() if embedding_of(layer) is not None]
    undefined = metric.needs & OF_PRODUCTS
    if undefined and embeddings:
        raise SpftError(
            f"`salience: {metric.name}` needs {', '.join(sorted(undefined))} of each weight, which an embedding "
            f"({first_of(embeddings, ', ')}), that multiplies no input, does not have: use `salience: gradient`, or "
            "leave it out of `target_modules`"
        )


def scorer(
    metric: Metric,
    layers: Mapping[str, SparseLayer],
    collected: Mapping[str, Mapping[str, Tensor]],
    ranks: Ranks,
    seed: int = 0,
    lift_rank: int = 128,
    read_weight: Callable[[SparseLayer], Tensor] = SparseLayer.read_weight,
) -> Callable[[int], Tensor]:
    """The function that scores the matrix of an index.

    Args:
        collected: need -> name of the layer -> what the pass found.
        read_weight: gives a layer's whole weight (out_features, in_features).

    Returns:
        A function that gives this rank's rows (rows, in_features), float32 and finite; every rank must ask it for the
        same index. It raises `SpftError` on every rank where a score cannot be used.
    """
    names, shapes = list(layers), list(shapes_of(layers).values())

    def sums_of(name: str) -> dict[str, Tensor]:
        # next to the weight, from wherever they were kept: a score is then the same to the bit
        device = device_of(layers[name])
        return {need: of_layer[name].to(device) for need, of_layer in collected.items() if need in metric.needs}

    def score(index: int) -> Tensor:
        name = names[index]
        statistics = Statistics(
            name=name,
            shape=shapes[index],
            index=index,
            seed=seed,
            ranks=ranks,
            lift_rank=lift_rank,
            collected=sums_of(name),
            read_weight=(lambda: read_weight(layers[name])) if metric.needs & OF_WEIGHT else None,
        )
        return on_every_rank(lambda: _checked(metric, statistics), ranks)

    return score


def _checked(metric: Metric, statistics: Statistics) -> Tensor:
    problem = f"`salience: {metric.name}` of {statistics.name}"
    rows, in_features = statistics.rows, statistics.shape[1]
    try:
        with torch.no_grad():
            scores = metric.score(statistics)
    except SpftError as error:
        raise SpftError(f"{problem}: {error}") from error
    except Exception as error:  # whatever a function of the user's own raises
        raise SpftError(f"{problem} failed: {type(error).__name__}: {error}") from error
    expected = (rows.stop - rows.start, in_features)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise SpftError(f"{problem} gave {found}: return a tensor of shape {expected}, a score for each entry")
    scores = scores.to(torch.float32)
    if not torch.isfinite(scores).all():
        raise SpftError(
            f"{problem} is not finite everywhere: check the function, the data and the precision of the run"
        )
    return scores
