"""What is told about the values of a sparse adapter wherever the trainer logs its loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import is_partitioned, own_part
from axolotl_spft.salience.install import adapted_layers

PREFIX = "spft/"


def watch_training(trainer: Any, model: nn.Module, ranks: Ranks, squares: Mapping[str, float]) -> None:
    """Add `Watch`'s figures to what the trainer logs of each training step.

    Callbacks see a log after the trainer has recorded it, and users' callbacks after those that report it: so its
    ``log`` is wrapped, on this trainer alone.
    """
    watch, log = Watch(model, ranks, squares), trainer.log

    @functools.wraps(log)
    def log_with_figures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # evaluations, and the summary at the end, have no loss of a step
        log({**logs, **watch.figures()} if "loss" in logs else logs, *args, **kwargs)

    trainer.log = log_with_figures


class Watch:
    """The figures of an adapter while it trains; all ranks must ask for them together.

    ``spft/values_norm``: ||S||, the Frobenius norm over all matrices.
    ``spft/rounded_away``: the share of values v that leave no trace in the base's dtype, fl(w + v) = w; only where the
    base weight itself holds W + S (not quantized, not partitioned by ZeRO-3), since w is at hand there.
    ``spft/delta_over_weight/<module>``: ||S|| / ||W|| over all matrices of that name, such as ``q_proj``.

    Each call reads the values alone.

    Args:
        squares: of the model's layers, from `axolotl_spft.tuner.step_unit.squares_of_weights`.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, squares: Mapping[str, float]):
        self.adapter, self.ranks = model.active_adapter, ranks
        self.layers, self.weight_squares = adapted_layers(model), squares

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Name -> figure."""
        # of the mask of now: another checkpoint's may leave other layers empty
        layers = {
            name: layer
            for name, layer in self.layers.items()
            if self.adapter in layer.spft_values and layer.mask(self.adapter).nnz
        }
        if not layers:
            return {}
        squares: dict[str, Any] = dict.fromkeys(map(_kind, layers), 0.0)
        weight_squares = dict.fromkeys(squares, 0.0)
        rounded, compared = [], 0
        partitioned = False
        for name, layer in layers.items():
            weight_squares[_kind(name)] += self.weight_squares.get(name, 0.0)
            values = layer.spft_values[self.adapter]
            partitioned |= is_partitioned(values)
            squares[_kind(name)] += own_part(values, self.ranks.rank).to(torch.float32).square().sum()
            if layer.in_place and not layer.merged:
                layer.revert()
                weight = layer.stored_weight
                # which may wait on the host for its next pass, where a layer's tensors are offloaded between two
                at = layer.storage_positions(layer.mask(self.adapter)).to(weight.device)
                originals = weight.take(at).to(values.device)
                rounded.append(((originals + values).to(originals.dtype) == originals).sum())
                compared += originals.numel()
        # one transfer from the device for all
        found = torch.stack([*squares.values(), *([torch.stack(rounded).sum().float()] if rounded else [])])
        sums: list[float] = (self.ranks.sum_(found) if partitioned else found).tolist()
        *by_kind, leftover = sums if rounded else [*sums, 0.0]
        result = {f"{PREFIX}values_norm": sum(by_kind) ** 0.5}
        if compared:
            result[f"{PREFIX}rounded_away"] = leftover / compared
        for kind, total in zip(squares, by_kind):
            if weight_squares[kind]:
                result[f"{PREFIX}delta_over_weight/{kind}"] = (total / weight_squares[kind]) ** 0.5
        return result


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
