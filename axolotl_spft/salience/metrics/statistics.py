"""What a score may ask of one matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError

GRADIENT = "gradient"
SQUARED_GRADIENT = "squared_gradient"
INPUT_SQUARES = "input_squares"
WEIGHT = "weight"
SYNAPTIC_FLOW = "synaptic_flow"
HESSIAN_GRADIENT = "hessian_gradient"
_ONE_PROCESS = Ranks()


class Statistics:
    """Of one weight W (out_features, in_features), what the pass found; read when it is asked for.

    On several ranks each one scores the rows `rows` of W. All tensors are float32, and none may be written to.

    Attributes:
        name: of the layer in the base model.
        shape: (out_features, in_features).
        index: of the layer among all that are scored.
        seed: of the run.
        ranks: the processes that share the rows.
        lift_rank: the option of this name.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        name: str = "",
        index: int = 0,
        seed: int = 0,
        ranks: Ranks = _ONE_PROCESS,
        lift_rank: int = 128,
        collected: Mapping[str, Tensor] | None = None,
        read_weight: Callable[[], Tensor] | None = None,
    ):
        self.shape, self.name, self.index, self.seed, self.ranks = shape, name, index, seed, ranks
        self.lift_rank = lift_rank
        self._collected_by_need, self._read_weight = collected or {}, read_weight

    @property
    def rows(self) -> slice:
        """The rows of W that this rank scores."""
        return self.ranks.rows(self.shape[0])

    @property
    def gradient(self) -> Tensor:
        """g = dL/dW summed over the sample: (rows, in_features). Needs ``gradient``."""
        return self._collected(GRADIENT)

    @property
    def squared_gradient(self) -> Tensor:
        """The sum over examples of the square of dL_e/dW, with L_e that example's share of its batch's loss.

        (rows, in_features). Needs ``squared_gradient``. An example is a row of a batch, or with sample packing a
        sequence of it, to whose tokens no other sequence may attend.
        """
        return self._collected(SQUARED_GRADIENT)

    @property
    def input_squares(self) -> Tensor:
        """The sum of x_j^2 over the sample's tokens that are no padding: (in_features). Needs ``input_squares``."""
        return self._collected(INPUT_SQUARES)

    @property
    def synaptic_flow(self) -> Tensor:
        """dR/d|W| of `axolotl_spft.salience.data_free`: (rows, in_features). Needs ``synaptic_flow``."""
        return self._collected(SYNAPTIC_FLOW)

    @property
    def hessian_gradient(self) -> Tensor:
        """H g: the Hessian of the sample's loss in all targeted weights, times its gradient: (rows, in_features).

        Needs ``hessian_gradient``.
        """
        return self._collected(HESSIAN_GRADIENT)

    @property
    def weight(self) -> Tensor:
        """These rows of W, dequantized where it is quantized: (rows, in_features). Needs ``weight``."""
        return self.whole_weight[self.rows]

    @property
    def whole_weight(self) -> Tensor:
        """All of W on every rank: (out_features, in_features). Needs ``weight``."""
        if self._read_weight is None:
            raise self._undeclared(WEIGHT)
        return self._read_weight().to(torch.float32)

    def sum_over_rows(self, matrix: Tensor) -> Tensor:
        """The sum of each column of (rows, in_features) over the rows of all ranks, which must all ask."""
        return self.ranks.sum_(matrix.sum(0))

    def _collected(self, need: str) -> Tensor:
        if need not in self._collected_by_need:
            raise self._undeclared(need)
        return self._collected_by_need[need]

    def _undeclared(self, need: str) -> SpftError:
        return SpftError(f"the score reads `{need}` without declaring it: write `@needs({need!r}, ...)` above it")
