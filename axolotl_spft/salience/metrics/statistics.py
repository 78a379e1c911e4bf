"""What a score may ask of one matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError

GRADIENT = "gradient"
WEIGHT = "weight"
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
    """

    def __init__(
        self,
        shape: tuple[int, int],
        name: str = "",
        index: int = 0,
        seed: int = 0,
        ranks: Ranks = _ONE_PROCESS,
        collected: Mapping[str, Tensor] | None = None,
        read_weight: Callable[[], Tensor] | None = None,
    ):
        self.shape, self.name, self.index, self.seed, self.ranks = shape, name, index, seed, ranks
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
    def weight(self) -> Tensor:
        """These rows of W, dequantized where it is quantized: (rows, in_features). Needs ``weight``."""
        if self._read_weight is None:
            raise self._undeclared(WEIGHT)
        return self._read_weight()[self.rows].to(torch.float32)

    def sum_over_rows(self, matrix: Tensor) -> Tensor:
        """The sum of each column of (rows, in_features) over the rows of all ranks, which must all ask."""
        return self.ranks.sum_(matrix.sum(0))

    def _collected(self, need: str) -> Tensor:
        if need not in self._collected_by_need:
            raise self._undeclared(need)
        return self._collected_by_need[need]

    def _undeclared(self, need: str) -> SpftError:
        return SpftError(f"the score reads `{need}` without declaring it: write `@needs({need!r}, ...)` above it")
