"""How exact a merge is: what rounding left of the deltas, and how far the weights are from those of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import sqrt

from torch import Tensor

_ROWS = 1024


@dataclass
class Exactness:
    """Sums over the matrices of a merge; squares are of Frobenius norms.

    Attributes:
        values: of the adapter.
        without_effect: values other than 0 that rounding to the dtype of the base leaves without effect.
        delta: square of S.
        rounding: square of what rounding changed at the positions of S.
        trained: square of the weights that training computed with.
        from_trained: square of the difference between the merged weights and those.
    """

    values: int = 0
    without_effect: int = 0
    delta: float = 0.0
    rounding: float = 0.0
    trained: float = 0.0
    from_trained: float = 0.0

    def add(self, other: Exactness) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def compare(self, merged: Tensor, trained: Tensor) -> None:
        """Add the distance of a merged matrix from what training computed with."""
        for part, reference in zip(merged.split(_ROWS), trained.split(_ROWS)):
            self.trained += float(reference.double().square().sum())
            self.from_trained += float((part.double() - reference.double()).square().sum())

    def summary(self) -> dict[str, float | int]:
        """Counts, and the relative errors ||rounding|| / ||S|| and ||merged - trained|| / ||trained||."""
        return {
            "values": self.values,
            "without_effect": self.without_effect,
            "rounding_error": sqrt(self.rounding / self.delta) if self.delta else 0.0,
            "difference_from_trained": sqrt(self.from_trained / self.trained) if self.trained else 0.0,
        }


def rounding(before: Tensor, values: Tensor, result: Tensor) -> Exactness:
    """What became of the exact sums before + values, which were rounded to ``result``."""
    exact = before.double() + values.double()
    idle = (result.double() == before.double()) & (values != 0)
    return Exactness(
        values=values.numel(),
        without_effect=int(idle.sum()),
        delta=float(values.double().square().sum()),
        rounding=float((result.double() - exact).square().sum()),
    )


def total(exactness: Mapping[str, Exactness]) -> Exactness:
    """The sum over all parameters, in the order of their names."""
    result = Exactness()
    for name in sorted(exactness):
        result.add(exactness[name])
    return result
