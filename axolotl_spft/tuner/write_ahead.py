"""Writes W + S of all layers at the start of a model's forward pass, at once instead of layer by layer, and W back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.ops.sums import Sum, assign_sums_, can_collect, collect_sums, restore_
from axolotl_spft.tuner.base_weight import Written
from axolotl_spft.tuner.layer import SpftLinear


class _Known(NamedTuple):
    """What a layer's weight holds for an adapter, or would hold, and where."""

    layer: SpftLinear
    held: Written
    names: tuple[str, ...]
    delta: tuple
    weights: dict[str, Tensor]
    weight_address: int
    values: dict[str, Tensor]
    values_address: int

    def is_held(self) -> bool:
        return self.layer._written is self.held and self._is_where_it_was()

    def is_valid(self) -> bool:
        """Whether the adapter still is the same: its delta is made anew with every change of the mask, and of W."""
        return self.layer._deltas.get(self.names) is self.delta

    def is_due(self) -> bool:
        """Whether the layer would write in its next forward pass."""
        layer = self.layer
        written = layer._written
        return (
            (written is None or written.mask is self.held.mask)
            and layer._filled_active_adapters() == self.names
            and not layer._disable_adapters
            and not layer.merged_adapters
            and layer.in_place
            and self._is_where_it_was()
        )

    def _is_where_it_was(self) -> bool:
        return (
            self.weights["weight"].data_ptr() == self.weight_address
            and self.values[self.names[0]].data_ptr() == self.values_address
        )


class _Adapter:
    """The layers of one adapter, of which ``writing`` wrote when they were looked for, some of them for themselves."""

    def __init__(self, known: Sequence[_Known], writing: int):
        self.known, self.writing = known, writing
        self._sums = collect_sums(
            Sum(layer.get_base_layer().weight.data, held.mask, held.originals, held.values, layer.transposed)
            for layer, held, *_ in known
        )

    def write(self) -> None:
        for sums in self._sums:
            assign_sums_(sums)
        for known in self.known:
            # past torch.nn.Module's own assignment, which takes as long as launching a kernel
            attributes = known.layer.__dict__
            attributes["_written"] = attributes["_ahead"] = known.held

    def end(self) -> None:
        for known in self.known:
            known.layer.__dict__["_ahead"] = None

    def restore(self) -> None:
        for sums in self._sums:
            restore_(sums)
        for known in self.known:
            known.layer.__dict__["_written"] = None


class WriteAhead:
    """Repeats what layers have written by themselves before, with the values of now.

    Only for weights that hold W + S in place, with one active adapter, where a kernel can write many; all others go on
    by themselves.

    Attributes:
        layers: all sparse layers of the model.
    """

    def __init__(self, layers: Sequence[SpftLinear]):
        self.layers = layers
        self._adapters: dict[tuple[str, ...], _Adapter] = {}
        self._current: _Adapter | None = None

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling: addresses are those of this model's tensors
        return {"layers": self.layers}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["layers"])

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Write before each forward pass of ``module``, inside which the layers then need not write."""
        return [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def restore(self) -> None:
        """Put W back, bit for bit, into the layers that hold what was written here; others still have to `revert`."""
        if self._is_held():
            self._current.restore()

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._is_held():
            self._current = self._find()
        if self._current is not None:
            self._current.write()

    def _end(self, *_: Any) -> None:
        if self._current is None or torch.compiler.is_compiling():
            return
        self._current.end()
        if self._writing() > self._current.writing:
            # experts that no token had come to before, and layers whose plan was forgotten
            self._adapters = {names: each for names, each in self._adapters.items() if each is not self._current}
            self._current = None

    def _writing(self) -> int:
        return sum([layer._written is not None for layer in self.layers])

    def _is_held(self) -> bool:
        return self._current is not None and all(known.is_held() for known in self._current.known)

    def _find(self) -> _Adapter | None:
        # tensors that nothing else uses any more are not kept alive
        self._adapters = {names: adapter for names, adapter in self._adapters.items()
                          if all(known.is_valid() for known in adapter.known)}  # fmt: skip
        for adapter in self._adapters.values():
            if all(known.is_due() for known in adapter.known):
                return adapter
        found = [known for known in map(_known, self.layers) if known is not None]
        if not found:
            return None
        adapter = self._adapters[found[0].names] = _Adapter(found, self._writing())
        return adapter


def _known(layer: SpftLinear) -> _Known | None:
    held = layer._written
    if held is None:
        return None
    weights = layer.get_base_layer()._parameters
    if "weight" not in weights or not can_collect(weights["weight"], held.originals, held.values):
        return None
    names, values = layer._filled_active_adapters(), layer.spft_values._parameters
    delta, address = layer._deltas.get(names), held.values.data_ptr()
    if delta is None or len(names) != 1 or values[names[0]].data_ptr() != address:
        # W + S was written from other values, such as the sum of several adapters'
        return None
    return _Known(layer, held, names, delta, weights, weights["weight"].data_ptr(), values, address)
