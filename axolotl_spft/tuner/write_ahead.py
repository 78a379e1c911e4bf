"""Writes W + S of all layers at once for as long as a model's forward or backward pass runs, and then W back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.ops.linear import owners_made
from axolotl_spft.ops.weight.sums import Sum, can_collect, collect_sums, restore_sums_, write_sums_
from axolotl_spft.tuner.base_weight import WRITING, Written
from axolotl_spft.tuner.deltas import MadeDelta
from axolotl_spft.tuner.end_of_backward import at_end_of_backward
from axolotl_spft.tuner.sparse_layer import SparseLayer


class _Known(NamedTuple):
    """What a layer's weight is to hold for an adapter, and where."""

    layer: SparseLayer
    held: Written
    names: tuple[str, ...]
    delta: MadeDelta
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
        return _may_be_written(self.layer, self.names) and self.is_where_it_was()

    def is_where_it_was(self) -> bool:
        return (
            self.layer._modules["base_layer"] is self.base_layer
            and self.weights["weight"].data_ptr() == self.weight_address
            and self.values[self.names[0]].data_ptr() == self.values_address
        )


class _Adapter:
    """Layers that are written together; ``deltas`` is how many had been made in all when these were looked for."""

    def __init__(self, known: Sequence[_Known], deltas: int):
        self.known, self.deltas = known, deltas
        self._sums = collect_sums(
            Sum(layer.get_base_layer().weight.data, held.mask, held.originals, held.values, layer.transposed)
            for layer, held, *_ in known
        )

    def all(self, condition: Callable[[_Known], bool]) -> bool:
        return all(map(condition, self.known))

    def write(self) -> None:
        # first: whoever is interrupted here finds what stands in `originals`, which is W from the beginning on
        self._hold(True)
        for sums in self._sums:
            write_sums_(sums)

    def restore(self) -> None:
        for sums in self._sums:
            restore_sums_(sums)
        self._hold(False)

    def _hold(self, held: bool) -> None:
        for known in self.known:
            # past torch.nn.Module's own assignment, which takes as long as launching a kernel
            known.layer.__dict__["_written"] = known.held if held else None


class WriteAhead:
    """Writes for all layers what each would write by itself, and puts W back after the last of the passes that run.

    Only for weights that hold W + S in place, with one active adapter, where a kernel can write many, and from a
    layer's second pass on; all others go on by themselves. The backward pass writes again: between the two, everybody
    sees W, whether or not a backward pass ever comes.

    Args:
        model: with sparse layers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._forget()
        self._find_layers()

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling: addresses are those of this model's tensors
        return {"_model": self._model}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()
        # the model is still being put together
        self._places, self._made = [], -1

    def _forget(self) -> None:
        self._adapters: dict[tuple[tuple[str, ...], ...], _Adapter] = {}
        self._current: _Adapter | None = None
        # forward passes by thread and module, backward passes by thread and autograd's number: the thread of each
        self._running: dict[tuple, int] = {}
        # of these passes; what is written refers to it
        self._threads: set[int] = set()
        self._missing = self._paused = False

    @property
    def layers(self) -> list[SparseLayer]:
        """All sparse layers of the model."""
        if self._made != owners_made():
            self._find_layers()
        return [layer for _, _, layer in self._places]

    @property
    def is_running(self) -> bool:
        """Whether a pass through the model runs."""
        return bool(self._running)

    def name_of(self, layer: nn.Module) -> str:
        """Of a layer, in the model."""
        return next((name for name, module in self._model.named_modules() if module is layer), "")

    def _find_layers(self) -> None:
        self._made = owners_made()
        self._places = [
            (module._modules, name, child)
            for module in self._model.modules()
            for name, child in module._modules.items()
            if isinstance(child, SparseLayer)
        ]
        for _, _, layer in self._places:
            layer.__dict__["_writer"] = ref(self)

    def originals(self) -> Iterator[Tensor]:
        """What is kept to put W back."""
        for adapter in self._adapters.values():
            for known in adapter.known:
                yield known.held.originals

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Write around each forward pass of ``module``, inside which the layers then need not write."""
        return [
            module.register_forward_pre_hook(self._begin_forward),
            module.register_forward_hook(self._end_forward, always_call=True),
        ]

    @contextmanager
    def ended(self) -> Iterator[None]:
        """After the block no pass of the model runs in this thread: torch calls no hooks where an interrupt ends it."""
        try:
            yield
        finally:
            if _key(self._model) in self._running:
                self._end(_key(self._model))

    def _begin_forward(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        key = _key(module)
        if key in self._running:
            # an interrupt (Ctrl-C) has ended that pass without a call of the hook
            self._over([each for each in self._running if each[0] == key[0]])
        self._begin(key)

    def _end_forward(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._end(_key(module))

    @contextmanager
    def running(self, owner: object) -> Iterator[None]:
        """Within the block, which may hold many forward passes, the weights are written once."""
        # the model within is not running yet: if it is listed, an interrupt has ended it
        self._over([_key(self._model)])
        key = _key(owner)
        self._begin(key)
        try:
            with self.ended():
                yield
        finally:
            self._end(key)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the weights hold W: rows of one batch use different adapters."""
        self.restore()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def write_for_backward(self) -> None:
        """See `axolotl_spft.tuner.base_weight.Writer`."""
        number = torch._C._current_graph_task_id()
        if number == -1:
            return
        key = ("backward", threading.get_ident(), number)
        with WRITING:
            if self._paused or key in self._running or _is_captured():
                return
            at_end_of_backward(lambda: self._end(key))
            self._begin(key)

    def tell_missing(self) -> None:
        """See `axolotl_spft.tuner.base_weight.Writer`."""
        self._missing = True

    def restore(self) -> None:
        """Put W back, bit for bit, in all layers that hold what was written here."""
        if self._is_held():
            self._current.restore()
        elif self._current is not None:
            for known in self._current.known:
                if known.layer._written is known.held:
                    known.layer.revert()

    def _begin(self, key: tuple) -> None:
        if self._paused:
            return
        with WRITING:
            if self._running:
                self._forget_dead_threads()
            outermost, thread = not self._running, threading.get_ident()
            self._running[key] = thread
            self._threads.add(thread)
            if outermost or not self._is_held():
                self.restore()
                self._current = self._find()
                if self._current is not None:
                    self._current.write()

    def _end(self, key: tuple) -> None:
        with WRITING:
            self._over([key])
            if self._running:
                return
            self.restore()
            if self._missing and self._current is not None and self._deltas() > self._current.deltas:
                # experts that no token had come to before, and layers whose plan was forgotten
                self._keep(lambda adapter: adapter is not self._current)
                self._current = None
            self._missing = False

    def _over(self, keys: Iterable[tuple]) -> None:
        with WRITING:
            for key in keys:
                self._running.pop(key, None)
            self._threads.intersection_update(self._running.values())

    def _forget_dead_threads(self) -> None:
        """End forward passes of threads that an interrupt has ended."""
        alive = sys._current_frames()
        self._over([key for key, thread in self._running.items() if key[0] == thread and thread not in alive])

    def _deltas(self) -> int:
        return sum([len(layer._deltas) for _, _, layer in self._places])

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
        found = [known for layer in self.layers if (known := _known(layer, self._threads)) is not None]
        if not found:
            return None
        adapter = self._adapters[tuple(known.names for known in found)] = _Adapter(found, self._deltas())
        return adapter

    def _keep(self, condition: Callable[[_Adapter], bool]) -> None:
        self._adapters = {names: adapter for names, adapter in self._adapters.items() if condition(adapter)}


def _key(owner: object) -> tuple[int, int]:
    return threading.get_ident(), id(owner)


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured, which would replay the writing but not the end of the pass."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _may_be_written(layer: SparseLayer, names: tuple[str, ...]) -> bool:
    return (
        layer.writes_ahead
        and layer._written is None
        and layer._filled_active_adapters() == names
        and not layer._disable_adapters
        and not layer.merged_adapters
        and layer.in_place
    )


def _known(layer: SparseLayer, threads: set[int]) -> _Known | None:
    # the memory may be another than when the layer was asked last, which another model may hold too
    layer.__dict__["_in_place"] = None
    names = layer._filled_active_adapters()
    delta = layer._deltas.get(names)
    if len(names) != 1 or delta is None or not _may_be_written(layer, names):
        return None
    base_layer, weights = layer._modules["base_layer"], layer.get_base_layer()._parameters
    parameters, mask = layer.spft_values._parameters, delta.delta.mask
    values = parameters[names[0]].detach()
    if "weight" not in weights or not can_collect(weights["weight"], values):
        return None
    weight = weights["weight"].detach()
    held = Written(values, mask, weight.take(layer.storage_positions(mask)), threads)
    return _Known(layer, held, names, delta, base_layer, weights, weight.data_ptr(), parameters, values.data_ptr())
