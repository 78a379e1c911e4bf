"""Gives a sparse adapter its mask, computed or drawn, and measures what that costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from axolotl_spft.bench.base import text_batch
from axolotl_spft.bench.mask_statistics import MaskStatistics, Shares, shares_of_area
from axolotl_spft.bench.masks import draw_mask, pool_share
from axolotl_spft.bench.memory import PeakMemory, synchronize
from axolotl_spft.budget import layer_budgets
from axolotl_spft.salience import MaskReport, select_mask
from axolotl_spft.salience.install import adapted_layers, install_masks
from axolotl_spft.salience.report import report_masks
from axolotl_spft.tuner import SpftConfig
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.shared_input import group_by_input
from axolotl_spft.tuner.state import shapes_of

_SHOW_PROGRESS_FROM = 100


@dataclass(frozen=True)
class Masking:
    """How masks come about.

    Attributes:
        device: where they are made.
        memory: of the process, for the pass's peak.
        tokens, samples: the rows that the salience pass reads. The adapter's config asks for more.
        area: draws masks that cover this share, whatever the salience.
        statistics: draws masks as concentrated as those recorded; None computes them.
    """

    device: torch.device
    memory: PeakMemory
    tokens: int
    samples: int
    area: float | None = None
    statistics: MaskStatistics | None = None


@dataclass(frozen=True)
class MaskCost:
    """Seconds of the salience pass and of what follows it, and the peak of both, where it can be known."""

    pass_seconds: float
    selection_seconds: float
    peak_bytes: int | None


def mask_model(model: nn.Module, masking: Masking) -> tuple[MaskReport, MaskCost | None]:
    """Fill the active adapter of ``model``."""
    config: SpftConfig = model.peft_config[model.active_adapter]
    if config.salience != "random" and (masking.area is not None or masking.statistics is not None):
        return _drawn(model, config, masking), None
    return _computed(model, masking)


def _computed(model: nn.Module, masking: Masking) -> tuple[MaskReport, MaskCost]:
    pass_end = None

    class Batches:
        """Read anew by a salience that needs them twice."""

        def __iter__(self) -> Iterator[Mapping[str, Any]]:
            nonlocal pass_end
            try:
                for index in range(masking.samples):
                    yield text_batch(model.config.vocab_size, masking.tokens, masking.device, 100 + index)
            finally:
                # reached as the pass asks for one row more than there are
                synchronize(masking.device)
                pass_end = time.perf_counter()

    masking.memory.reset()
    synchronize(masking.device)
    start = time.perf_counter()
    report = select_mask(model, Batches())
    synchronize(masking.device)
    end = time.perf_counter()
    pass_end = pass_end or start
    return report, MaskCost(pass_end - start, end - pass_end, masking.memory.peak_bytes())


def _drawn(model: nn.Module, config: SpftConfig, masking: Masking) -> MaskReport:
    layers = adapted_layers(model)
    counts = layer_budgets(list(shapes_of(layers).values()), **config.budget(list(layers)))
    nnz_of = dict(zip(layers, counts))
    groups = group_by_input({name: layer.in_features for name, layer in layers.items()})
    generator = torch.Generator(masking.device).manual_seed(0)
    masks = {}
    for group in tqdm(groups, desc="Masks", leave=False, disable=len(layers) < _SHOW_PROGRESS_FROM):
        shares = {name: _shares(name, layers[name], nnz_of[name], config, masking) for name in group}
        in_features = layers[group[0]].in_features
        pool = pool_share([each.columns for each in shares.values()], max(each.union for each in shares.values()))
        among = torch.randperm(in_features, generator=generator, device=masking.device)[: math.ceil(pool * in_features)]
        for name, each in shares.items():
            layer = layers[name]
            masks[name] = draw_mask(
                layer.out_features, in_features, nnz_of[name], each.rows, each.columns, generator, among
            )
    install_masks(model, model.active_adapter, masks, {"salience": "drawn"})
    return report_masks({name: (masks[name], layer.in_features) for name, layer in layers.items()}, "drawn", 0)


def _shares(name: str, layer: SpftLinear, nnz: int, config: SpftConfig, masking: Masking) -> Shares:
    if masking.area is not None:
        return shares_of_area(masking.area)
    density = nnz / (layer.out_features * layer.in_features)
    return masking.statistics.shares(config.salience, config.scope, name.rpartition(".")[2], density)
