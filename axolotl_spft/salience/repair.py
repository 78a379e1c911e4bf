"""Repair of a quantized base: the entries whose quantization error costs most, and what their values begin at.

Symbols: W is a weight before it was quantized, in the dtype that the model was loaded in, Q(W) what the quantized base
has of it, E = W - Q(W), and x an input of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks, on_every_rank
from axolotl_spft.errors import SpftError, SpftFileError, first_of
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of

# what a mask's record says of an adapter's values: how many begin at unquantized weights, and where these were
REPAIRED = ("repaired", "repair_from")
_ONE_PROCESS = Ranks()
# rows of a weight that are squared at a time
_ROWS = 1024


class MatrixError(NamedTuple):
    """Squares of Frobenius norms, with X the inputs of the sample, by the second moment of each input column alone.

    Attributes:
        before: of E X.
        after: of what is left of it where the entries of the mask are W's.
        whole: of W X.
    """

    before: float
    after: float
    whole: float


class Repair:
    """The unquantized weights of the layers that can be repaired, read one matrix at a time.

    Every rank reads its own rows of a matrix; all methods must be called on every rank.

    Args:
        checkpoint: holds the unquantized weights.
        layers: those that are repaired, by their names in the base model.
        share: of the values of each matrix, those that go to the largest errors.
        ranks: the processes that share the rows.
        dtype: that the model was loaded in, if it is known.

    Attributes:
        counts: how many values of each matrix went to its largest errors.
        originals: of each matrix that was kept, W at the entries of its mask: (nnz).
        errors: of each of these.
        squares: the sum of squares of each input column over the sample, (in_features), by layer; without them all
            columns count alike.
    """

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        layers: Mapping[str, SparseLayer],
        share: float,
        ranks: Ranks = _ONE_PROCESS,
        dtype: torch.dtype | None = None,
    ):
        self.layers, self.share, self.originals, self.errors = layers, share, {}, {}
        self.counts: dict[str, int] = {}
        self.squares: Mapping[str, Tensor] = {}
        self._checkpoint, self._ranks, self._dtype = checkpoint, ranks, dtype
        # read for the scores of a matrix, and as a rule once more as soon as its positions are known
        self._last: tuple[str, Tensor] | None = None
        self._bar = tqdm(total=len(layers), desc="Repair", unit="matrix", disable=ranks.rank != 0, delay=2)

    def count(self, name: str, count: int) -> int:
        """How many of ``count`` values of a matrix go to its largest errors."""
        if name not in self.layers:
            return 0
        # of the decimal number that was written, not of the binary one below it
        self.counts[name] = math.floor(Fraction(str(self.share)) * count)
        return self.counts[name]

    def scores(self, name: str) -> Tensor:
        """|E_ij| rms(x_j) up to a factor: this rank's rows (rows, in_features), float32."""
        weight, quantized = self._rows(name)
        # what a quantized layer is dequantized to is its caller's, to change too: no third matrix in float32
        scores = quantized.to(torch.float32)
        scores -= weight
        return scores.abs_().mul_(self._scale(name, scores.device))

    def keep(self, name: str, at: Tensor) -> None:
        """Keep W at the positions of a matrix' mask, and note the error before and after.

        Args:
            at: row * in_features + column, int64, ascending; the same on every rank.

        Raises:
            SpftFileError: W is not what was quantized.
        """
        if name not in self.layers:
            return
        weight, quantized = self._rows(name)
        scale, in_features = self._scale(name, weight.device), self.layers[name].in_features
        own = self._ranks.own_positions(at, (self.layers[name].out_features, in_features)).to(weight.device)
        originals = weight.reshape(-1)[own]
        replaced = (originals.to(torch.float32) - quantized.reshape(-1)[own]) * scale[own % in_features]
        sums = torch.zeros(3, dtype=torch.float64)
        for part, of_base in zip(weight.split(_ROWS), quantized.split(_ROWS)):
            part = part.to(torch.float32, copy=True)
            sums[2] += float((part * scale).square_().sum(dtype=torch.float64))
            sums[0] += float(part.sub_(of_base).mul_(scale).square_().sum(dtype=torch.float64))
        sums[1] = float(replaced.square_().sum(dtype=torch.float64))
        before, gone, whole = self._ranks.sum_(sums).tolist()
        if before > whole:
            # quantizing leaves errors that are a part of what was quantized
            raise SpftFileError(
                f"{name} in {self._checkpoint.shards.folder} differs from the quantized weight by "
                f"{(before / whole) ** 0.5 if whole else math.inf:.0%} of itself, so it belongs to another model: name "
                "the folder of the model that was quantized in `repair_from`"
            )
        self.errors[name] = MatrixError(before, max(before - gone, 0.0), whole)
        self.originals[name] = concatenated(originals, self._ranks)
        self._last = None
        self._bar.update()
        if len(self.originals) == len(self.layers):
            self._bar.close()

    def record(self) -> dict[str, int | str]:
        """What the mask's record says of what was kept, under the keys `REPAIRED`."""
        count = sum(map(len, self.originals.values()))
        return dict(zip(REPAIRED, (count, str(self._checkpoint.shards.folder))))

    def _scale(self, name: str, device: torch.device) -> Tensor:
        """sqrt(sum of x_j^2) of each input column: (in_features) float32."""
        squares = self.squares.get(name)
        if squares is None:
            return torch.ones(self.layers[name].in_features, device=device)
        return squares.to(device, torch.float32).sqrt()

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        """This rank's rows of W and of Q(W), on the layer's device."""
        layer = self.layers[name]
        rows = self._ranks.rows(layer.out_features)
        quantized = layer.read_weight()
        if self._last is None or self._last[0] != name:
            self._last = None
            weight = on_every_rank(lambda: self._checkpoint.read_rows(name, rows.start, rows.stop), self._ranks)
            self._last = name, weight.to(quantized.device, _dtype_of(quantized, self._dtype, weight))
        return self._last[1], quantized[rows]


def concatenated(originals: Tensor, ranks: Ranks) -> Tensor:
    """The ranks' entries (n) one after the other; as bytes, which every back end sends."""
    return ranks.concatenate(originals.contiguous().view(torch.uint8)).view(originals.dtype)


def _dtype_of(quantized: Tensor, loaded: torch.dtype | None, weight: Tensor) -> torch.dtype:
    """The dtype of what was quantized of the checkpoint's ``weight``: 16 bits where it or the model has no more.

    Args:
        loaded: that of the model: weights of 8 bits are dequantized to float32 whatever it is.
    """
    known = [dtype for dtype in (quantized.dtype, loaded, weight.dtype) if dtype is not None]
    return next((dtype for dtype in known if dtype.itemsize == 2), torch.float32)


def open_repair(
    model: nn.Module, config: SpftConfig, layers: Mapping[str, SparseLayer], ranks: Ranks
) -> tuple[Repair, list[str]]:
    """What the option ``repair`` asks for, and sentences about the matrices that it cannot be done in.

    Args:
        model: the base model, whose modules have the names of ``layers``.

    Raises:
        SpftError: no matrix is quantized, or entries of the quantized ones cannot be replaced.
        SpftFileError: there are no unquantized weights of any.
    """
    key = f"`repair: {config.repair}`"
    quantized = {name: layer for name, layer in layers.items() if layer.quantization_backend is not None}
    if not quantized:
        raise SpftError(f"{key} is about the error of a quantized base, and this one is not quantized: leave it out")
    fixed = [name for name, layer in quantized.items() if not layer.repairs]
    if fixed:
        kind = quantized[fixed[0]].quantization_backend.backend_name
        raise SpftError(
            f"{key} replaces entries of the quantized weights, and those of a {kind} layer cannot be read or replaced "
            f"({first_of(fixed, ', ')}): leave it out, or quantize the base with bitsandbytes (`load_in_4bit: true`)"
        )
    checkpoint = open_unquantized(key, model, config, ranks)
    problems = problems_with(checkpoint, quantized)
    if len(problems) == len(quantized):
        raise SpftFileError(
            f"{key}: {checkpoint.shards.folder} has the unquantized weight of none of the matrices "
            f"({first_of(list(problems.values()), '; ')}): name the folder of the base model in `repair_from`"
        )
    repaired = {name: layer for name, layer in quantized.items() if name not in problems}
    notes = []
    if problems:
        notes.append(
            f"the values of {len(problems)} of the {len(quantized)} quantized matrices begin at 0 and none of them go "
            f"to the quantization error, since {checkpoint.shards.folder} has no unquantized weight for them "
            f"({first_of(list(problems.values()), '; ')}): name the folder of the base model in `repair_from`"
        )
    loaded = getattr(model.config, "dtype", None)
    loaded = loaded if isinstance(loaded, torch.dtype) else None
    return Repair(checkpoint, repaired, config.repair, ranks, loaded), notes


def open_unquantized(key: str, model: nn.Module, config: SpftConfig, ranks: Ranks) -> BaseCheckpoint:
    """The checkpoint that holds the weights from before quantization.

    Args:
        key: what reads them, for the errors.
        model: the base model.

    Raises:
        SpftFileError: there is none.
    """
    name = config.repair_from or config.base_model_name_or_path or getattr(model.config, "_name_or_path", None)
    if not name:
        raise SpftFileError(f"{key} reads the unquantized weights, and nothing says where they are: set `repair_from`")
    revision = None if config.repair_from else getattr(model.config, "_commit_hash", None)
    try:
        return on_every_rank(lambda: BaseCheckpoint(name, model, revision), ranks)
    except SpftFileError as error:
        raise SpftFileError(f"{key} reads the unquantized weights, but {error} (`repair_from`)") from error


def problems_with(checkpoint: BaseCheckpoint, layers: Mapping[str, SparseLayer]) -> dict[str, str]:
    """By layer, why its weight cannot be had."""
    problems = {name: f"{name} is missing" for name in checkpoint.missing(layers)}
    for name, shape in shapes_of(layers).items():
        found = None if name in problems else checkpoint.matrix_shape(name)
        if found not in (None, shape):
            problems[name] = f"{name} is {found} there, but {shape} in the model"
    return problems
