"""What a salience metric is: what it needs to know of a matrix, and the score that it makes of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.metrics import METRICS
from axolotl_spft.salience.metrics.statistics import (
    GRADIENT,
    HESSIAN_GRADIENT,
    INPUT_SQUARES,
    SQUARED_GRADIENT,
    SYNAPTIC_FLOW,
    WEIGHT,
    Statistics,
)

Score = Callable[[Statistics], Tensor]

# what a backward pass over the sample gathers
GATHERED = (GRADIENT, SQUARED_GRADIENT, INPUT_SQUARES)
NEEDS = (*GATHERED, WEIGHT, SYNAPTIC_FLOW, HESSIAN_GRADIENT)
# what the sample must be run through the model for
FROM_SAMPLE = frozenset({*GATHERED, HESSIAN_GRADIENT})
# what cannot be had of a weight that cannot be read
OF_WEIGHT = frozenset({WEIGHT, SYNAPTIC_FLOW})
# what is defined by the products of a weight with its inputs, which an embedding has none of
OF_PRODUCTS = frozenset({SQUARED_GRADIENT, INPUT_SQUARES, SYNAPTIC_FLOW, HESSIAN_GRADIENT})
# what of one matrix depends on all the others, at the pretrained weights
OF_ALL_MATRICES = frozenset({SYNAPTIC_FLOW, HESSIAN_GRADIENT})

# need: why it cannot be had of experts that are one parameter
NOT_OF_EXPERTS = {
    SQUARED_GRADIENT: "squares the gradient of each example, and experts' inputs no longer tell whose tokens they are",
    INPUT_SQUARES: "reads the inputs of each matrix, which experts that are one parameter take inside their module",
    HESSIAN_GRADIENT: "differentiates each layer's product twice, and these experts multiply inside their module",
    SYNAPTIC_FLOW: "runs one token through the model, which comes to a few of the experts alone",
}


@dataclass(frozen=True)
class Metric:
    """A way to score the entries of a weight.

    Attributes:
        name: as in the option ``salience``.
        needs: which of `NEEDS` the pass has to provide.
        score: gives float32 scores of the shape of this rank's rows (rows, in_features); higher is more salient.
    """

    name: str
    needs: frozenset[str]
    score: Score


def problem_with_experts(metric: Metric, names: str) -> str | None:
    """Why a metric cannot score the experts in ``target_parameters``, whose names are told, and what to write."""
    for need, reason in NOT_OF_EXPERTS.items():
        if need in metric.needs:
            return (
                f"`salience: {metric.name}` {reason} ({names}): use `salience: gradient` or `balanced`, or leave "
                "`target_parameters` out"
            )
    return None


def accumulators_of(needs: Collection[str]) -> int:
    """How many float32 matrices of its size the pass keeps for each weight, at most at a time."""
    kept = {GRADIENT, SQUARED_GRADIENT, SYNAPTIC_FLOW}.intersection(needs)
    if HESSIAN_GRADIENT in needs:
        # the gradient, which is the direction; the sum of H g; what one batch adds to that
        return len(kept | {GRADIENT}) + 2
    return len(kept)


def needs(*names: str) -> Callable[[Score], Score]:
    """Declare what a score function reads of its `Statistics`, among `NEEDS`; without it that is the gradient."""

    def declare(score: Score) -> Score:
        score.needs = names
        return score

    return declare


def load_metric(salience: str) -> Metric:
    """The metric of the option ``salience``: a name of `METRICS`, or ``module:function`` of the user's own.

    Raises:
        SpftError: the module or the function does not exist, or declares a need that there is not.
    """
    module_name, _, function_name = METRICS.get(salience, salience).partition(":")
    remedy = f"write `package.module:function`, or one of {', '.join(METRICS)}"
    try:
        score = getattr(importlib.import_module(module_name), function_name or "score")
    except Exception as error:  # whatever a module of the user's own raises
        raise SpftError(
            f"`salience: {salience}` cannot be imported ({type(error).__name__}: {error}): {remedy}"
        ) from error
    if not callable(score):
        raise SpftError(f"`salience: {salience}` is no function: {remedy}")
    declared = getattr(score, "needs", (GRADIENT,))
    declared = frozenset((declared,) if isinstance(declared, str) else declared)
    if not declared <= frozenset(NEEDS):
        raise SpftError(
            f"`salience: {salience}` needs {', '.join(sorted(declared - frozenset(NEEDS)))}, which the pass does not "
            f"know: declare some of {', '.join(NEEDS)}"
        )
    return Metric(salience, declared, score)
