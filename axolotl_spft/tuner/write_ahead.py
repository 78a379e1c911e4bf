"""Writes W + S of all layers at the start of a model's forward pass, at once instead of layer by layer, and W back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.ops.linear import owners_made
from axolotl_spft.ops.weight.sums import Sum, assign_sums_, can_collect, collect_sums, restore_
from axolotl_spft.tuner.base_weight import Written
from axolotl_spft.tuner.layer import SpftLinear


class _Known(NamedTuple):
    """What a layer's weight holds for an adapter, or would hold, and where."""

    layer: SpftLinear
    held: Written
    names: tuple[str, ...]
    delta: tuple
    base_layer: nn.Module
    weights: dict[str, Tensor]
    weight_address: int
    values: dict[str, Tensor]
    values_address: int

    def is_held(self) -> bool:
        return self.layer._written is self.held and self.is_where_it_was()

    def is_valid(self) -> bool:
        """Whether the layer's delta still is the same: it is made anew with every change of the mask."""
        return self.layer._deltas.get(self.names) is self.delta

    def is_due(self) -> bool:
        """Whether the layer, as part of the model, would write this in its next forward pass."""
        layer = self.layer
        written = layer._written
        return (
            (written is None or written.mask is self.held.mask)
            and layer._filled_active_adapters() == self.names
            and not layer._disable_adapters
            and not layer.merged_adapters
            and layer.in_place
            and self.is_where_it_was()
        )

    def is_where_it_was(self) -> bool:
        return (
            self.layer._modules["base_layer"] is self.base_layer
            and self.weights["weight"].data_ptr() == self.weight_address
            and self.values[self.names[0]].data_ptr() == self.values_address
        )


class _Adapter:
    """Layers that are written together; ``writing`` is how many held an S when these were looked for."""

    def __init__(self, known: Sequence[_Known], writing: int):
        self.known, self.writing = known, writing
        self._sums = collect_sums(
            Sum(layer.get_base_layer().weight.data, held.mask, held.originals, held.values, layer.transposed)
            for layer, held, *_ in known
        )

    def all(self, condition: Callable[[_Known], bool]) -> bool:
        return all(map(condition, self.known))

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

    Args:
        model: with sparse layers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._adapters: dict[tuple[tuple[str, ...], ...], _Adapter] = {}
        self._current: _Adapter | None = None
        self._find_layers()

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling: addresses are those of this model's tensors
        return {"_model": self._model}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._adapters, self._current = {}, None
        # the model is still being put together
        self._places, self._made = [], -1

    @property
    def layers(self) -> list[SpftLinear]:
        """All sparse layers of the model."""
        if self._made != owners_made():
            self._find_layers()
        return [layer for _, _, layer in self._places]

    def _find_layers(self) -> None:
        self._made = owners_made()
        self._places = [
            (module._modules, name, child)
            for module in self._model.modules()
            for name, child in module._modules.items()
            if isinstance(child, SpftLinear)
        ]

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Write before each forward pass of ``module``, inside which the layers then need not write."""
        return [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def restore(self) -> None:
        """Put W back, bit for bit, if all layers hold what was written here; otherwise each still has to `revert`."""
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
            self._keep(lambda adapter: adapter is not self._current)
            self._current = None

    def _writing(self) -> int:
        return sum([layer._written is not None for _, _, layer in self._places])

    def _is_held(self) -> bool:
        return self._current is not None and self._current.all(_Known.is_held)

    def _find(self) -> _Adapter | None:
        self._keep(lambda adapter: adapter.all(_Known.is_valid))
        if any(place.get(name) is not layer for place, name, layer in self._places):
            # layers were taken out of the model, whose weights are no longer to be written
            self._find_layers()
            self._adapters = {}
        due = [each for each in self._adapters.values() if each.all(_Known.is_due)]
        if due:
            return max(due, key=lambda adapter: len(adapter.known))
        # so that tensors that nothing else uses any more are not kept alive
        self._keep(lambda adapter: adapter.all(_Known.is_where_it_was))
        found = [known for known in map(_known, self.layers) if known is not None]
        if not found:
            return None
        adapter = self._adapters[tuple(known.names for known in found)] = _Adapter(found, self._writing())
        return adapter

    def _keep(self, condition: Callable[[_Adapter], bool]) -> None:
        self._adapters = {names: adapter for names, adapter in self._adapters.items() if condition(adapter)}


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
    base_layer = layer._modules["base_layer"]
    return _Known(layer, held, names, delta, base_layer, weights, weights["weight"].data_ptr(), values, address)
