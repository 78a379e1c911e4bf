"""Writes W + S of all layers at the start of a model's forward pass, at once instead of layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.ops.sums import Sum, Sums, assign_sums_, can_collect, collect_sums
from axolotl_spft.tuner.base_weight import Written
from axolotl_spft.tuner.layer import SpftLinear


class _Known(NamedTuple):
    """What a layer's weight holds, and where: while all of it stays so, the writing can be repeated."""

    layer: SpftLinear
    held: Written
    weights: dict[str, Tensor]
    weight_address: int
    values: dict[str, Tensor]
    adapter_name: str
    values_address: int

    def holds(self) -> bool:
        return (
            self.layer._written is self.held
            and self.weights["weight"].data_ptr() == self.weight_address
            and self.values[self.adapter_name].data_ptr() == self.values_address
        )


class WriteAhead:
    """Repeats what layers have written by themselves before, with the values of now.

    Only for weights that hold W + S in place, with one active adapter, where a kernel can write many; all others go on
    by themselves.
    """

    def __init__(self, layers: Sequence[SpftLinear]):
        self._layers = layers
        self._forget()

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling: addresses are those of this model's tensors
        return {"layers": self._layers}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["layers"])

    def _forget(self) -> None:
        self._known: list[_Known] = []
        self._sums: list[Sums] = []

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Write before each forward pass of ``module``, inside which the layers then need not write."""
        return [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not (self._known and all(known.holds() for known in self._known)):
            self._learn()
        if self._known:
            self._write()

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for known in self._known:
            known.layer.__dict__["_ahead"] = None

    def _learn(self) -> None:
        self._forget()
        found = [_known(layer) for layer in self._layers]
        self._known = [known for known in found if known is not None]
        if self._known:
            self._sums = collect_sums(
                Sum(layer.get_base_layer().weight.data, held.mask, held.originals, held.values, layer.transposed)
                for layer, held, *_ in self._known
            )

    def _write(self) -> None:
        for sums in self._sums:
            assign_sums_(sums)
        for known in self._known:
            # past torch.nn.Module's own assignment, which takes as long as launching a kernel
            known.layer.__dict__["_ahead"] = known.held


def _known(layer: SpftLinear) -> _Known | None:
    held = layer._written
    if held is None:
        return None
    weights = layer.get_base_layer()._parameters
    if "weight" not in weights or not can_collect(weights["weight"], held.originals, held.values):
        return None
    names, values = layer._filled_active_adapters(), layer.spft_values._parameters
    address = held.values.data_ptr()
    if len(names) != 1 or values[names[0]].data_ptr() != address:
        # W + S was written from other values, such as the sum of several adapters'
        return None
    return _Known(layer, held, weights, weights["weight"].data_ptr(), values, names[0], address)
