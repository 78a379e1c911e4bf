"""What grown values begin at where an adapter repairs a quantized base: W from before it was quantized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.config import SpftConfig
from axolotl_spft.dynamic.exchange import Exchange
from axolotl_spft.engine.ranks import Ranks, on_every_rank
from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.salience.repair import concatenated, open_unquantized, problems_with
from axolotl_spft.tuner.sparse_layer import SparseLayer

_KEY = "`reselect` of an adapter that repairs a quantized base"


class GrownOriginals:
    """The original weights of an adapter's repaired matrices under masks that change, read one matrix at a time.

    All methods must be called on every rank, each of which reads its own rows.

    Args:
        checkpoint: holds the unquantized weights.
        layers: those that the adapter repairs, by their names in the base model.
    """

    def __init__(self, checkpoint: BaseCheckpoint, layers: Mapping[str, SparseLayer], adapter_name: str):
        self.layers, self.adapter_name, self._checkpoint = layers, adapter_name, checkpoint

    def after(self, name: str, found: Exchange, ranks: Ranks) -> Tensor | None:
        """W at the entries of a mask after an exchange: (nnz); None of a matrix that is not repaired.

        Raises:
            SpftFileError: the file cannot be read, or the entries that stay are others in it.
        """
        if name not in self.layers:
            return None
        held, kept = self._held(name), found.sources >= 0
        originals = self._read(name, found.mask, held.dtype, ranks).to(held.device)
        kept = kept.to(held.device)
        self._compare(name, originals[kept], held[found.sources.to(held.device)[kept]])
        return originals

    def check(self, ranks: Ranks) -> None:
        """Check by the first of the matrices that the adapter's original weights came from this checkpoint.

        Raises:
            SpftFileError: they did not.
        """
        name, layer = next(iter(self.layers.items()))
        held = self._held(name)
        originals = self._read(name, layer.mask(self.adapter_name), held.dtype, ranks)
        self._compare(name, originals.to(held.device), held)

    def _held(self, name: str) -> Tensor:
        return self.layers[name].originals(self.adapter_name)

    def _read(self, name: str, mask: Mask, dtype: torch.dtype, ranks: Ranks) -> Tensor:
        layer = self.layers[name]
        rows, shape = ranks.rows(layer.out_features), (layer.out_features, layer.in_features)
        weight = on_every_rank(lambda: self._checkpoint.read_rows(name, rows.start, rows.stop), ranks)
        own = ranks.own_positions(positions(mask, layer.in_features), shape).to(weight.device)
        return concatenated(weight.reshape(-1)[own].to(dtype), ranks)

    def _compare(self, name: str, read: Tensor, held: Tensor) -> None:
        # the same on every rank, which hold and read the same
        if not torch.equal(read, held):
            folder = self._checkpoint.shards.folder
            raise SpftFileError(
                f"{_KEY} reads the unquantized weights, and {folder} holds other ones of {name} than the adapter: name "
                "the folder of the base model that it was trained on in `repair_from`"
            )


def open_grown_originals(
    model: nn.Module, config: SpftConfig, adapter_name: str, layers: Mapping[str, SparseLayer], ranks: Ranks
) -> GrownOriginals | None:
    """The original weights of the matrices that an adapter repairs; None where it repairs none.

    Args:
        model: the base model, whose modules have the names of ``layers``.
        layers: those whose masks change.

    Raises:
        SpftFileError: the unquantized weights of one cannot be read, or are others than the adapter's.
    """
    repaired = {name: layer for name, layer in layers.items() if adapter_name in layer.spft_originals}
    if not repaired:
        return None
    checkpoint = open_unquantized(_KEY, model, config, ranks)
    problems = problems_with(checkpoint, repaired)
    if problems:
        raise SpftFileError(
            f"{_KEY} reads the unquantized weights, and {checkpoint.shards.folder} lacks them "
            f"({first_of(list(problems.values()), '; ')}): name the folder of the base model in `repair_from`"
        )
    originals = GrownOriginals(checkpoint, repaired, adapter_name)
    originals.check(ranks)
    return originals
