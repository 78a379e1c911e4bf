"""The sparse deltas of one parameter of a module of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.experts import ExpertMask, ExpertUse, Watcher, weight_in_graph
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.weight.scatter import positions_in
from axolotl_spft.tuner.base_weight import WRITING
from axolotl_spft.tuner.end_of_backward import at_end_of_backward
from axolotl_spft.tuner.expert_weight import (
    is_parametrized,
    quantized_part,
    replaced,
    shape_in,
    stores_transposed,
    weight_in,
)
from axolotl_spft.tuner.offloading import execution_device
from axolotl_spft.tuner.sparse_layer import SparseLayer


class ExpertMatrix(SparseLayer):
    """W (experts x out_features, in_features) of one parameter of three dimensions, and S of each adapter.

    It has no forward pass: `axolotl_spft.tuner.experts.SpftExperts`, whose child it is, runs the module with W + S in
    the place of W.

    Args:
        experts: the module that owns the parameter.
        parameter_name: of the parameter in it.
        adapter_name: of the first adapter.
    """

    # it is no product of the layer's that multiplies
    writes_ahead = False

    def __init__(self, experts: nn.Module, parameter_name: str, adapter_name: str):
        self.parameter_name = parameter_name
        transposed = stores_transposed(experts)
        self.n_experts, rows, columns = shape_in(experts, parameter_name)
        rows, columns = (columns, rows) if transposed else (rows, columns)
        super().__init__(experts, adapter_name, (self.n_experts * rows, columns), transposed)
        self._watchers: list[tuple[Watcher, bool]] = []
        self._other_values: dict[str, Tensor] = {}
        self.add_empty_adapter(adapter_name)

    # --- the weight, which the module above holds

    def _hold_base_layer(self, base_layer: nn.Module) -> None:
        # in a tuple: as a submodule its weights would be there twice
        self._experts = (base_layer,)

    def get_base_layer(self) -> nn.Module:
        return self._experts[0]

    @property
    def base_layer(self) -> nn.Module:
        """The module of the experts."""
        return self._experts[0]

    @property
    def stored_weight(self) -> Tensor:
        return weight_in(self.base_layer, self.parameter_name)

    @property
    def weight_device(self) -> torch.device:
        held = quantized_part(self.base_layer, self.parameter_name)
        return execution_device(self.base_layer) or (self.stored_weight if held is None else held).device

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        held = quantized_part(base_layer, self.parameter_name)
        return self.weight_device, (self.stored_weight if held is None else held).dtype

    def _may_hold_delta(self) -> bool:
        return not is_parametrized(self.base_layer, self.parameter_name) and super()._may_hold_delta()

    def storage_positions(self, mask: Mask) -> Tensor:
        return positions_in(self.stored_weight, mask, self.transposed)

    def merge_deltas(self, *args, **kwargs) -> None:
        if is_parametrized(self.base_layer, self.parameter_name):
            raise SpftError(
                f"{self.parameter_name} is quantized by a parametrization, into which nothing can be merged: keep the "
                "adapter unmerged, or merge into the unquantized base model (`axolotl spft merge --onto base`)"
            )
        super().merge_deltas(*args, **kwargs)

    # --- passes

    @property
    def is_used(self) -> bool:
        """Whether a forward pass that begins now needs the gradient of W."""
        return bool(self._watchers or self.adapters_to_apply())

    def watch_gradient(self, watcher: Watcher, all_at_once: bool = False) -> Callable[[], None]:
        """Let every backward pass give its dense gradient of W to ``watcher``, until what is returned is called.

        Args:
            all_at_once: whether it is given the gradient of all experts together, once for each forward pass.
        """
        entry = (watcher, all_at_once)
        self._watchers.append(entry)
        return lambda: self._watchers.remove(entry)

    @contextmanager
    def computing_with(self, adapter_name: str, values: Tensor) -> Iterator[None]:
        """Within the block the experts compute with these values (nnz) of an adapter, whose own stay as they are."""
        before = self._other_values
        self._other_values = {**before, adapter_name: values}
        try:
            yield
        finally:
            self._other_values = before

    def values(self, adapter_name: str) -> Tensor:
        values = self._other_values.get(adapter_name)
        return super().values(adapter_name) if values is None else values

    @contextmanager
    def in_use(self, one_by_one: bool) -> Iterator[Callable[[], None] | None]:
        """Within the block the module of the experts multiplies by W + S of the active adapters.

        Args:
            one_by_one: whether it takes the weights expert by expert, see `axolotl_spft.ops.experts`.

        Yields:
            What must be called in the backward pass before anything multiplies by the weight; None if nothing must.
        """
        names = self.adapters_to_apply()
        where, values = self.delta_of(names) if names else (None, None)
        if not names:
            watched = bool(self._watchers)
            with self._given(values, where, self.stored_weight.detach(), one_by_one) if watched else nullcontext():
                # of another forward pass the same backward pass may have left W + S
                yield self.revert if self.in_place else None
        elif not self.in_place:
            with self._given(values, where, self._fresh_sum(values, where.mask), one_by_one):
                yield None
        else:
            with self._written_for_now(values, where.mask) as weight, self._given(values, where, weight, one_by_one):
                yield partial(self._hold_for_backward, values.detach(), where.mask, weight.data_ptr())

    def _make_delta(self, names: tuple[str, ...]) -> tuple[ExpertMask, tuple[Tensor, ...]]:
        with torch.inference_mode(False), torch.no_grad():
            mask, places = (self.mask(names[0]), ()) if len(names) == 1 else self._union(names)
            return ExpertMask(mask, self.n_experts), places

    @contextmanager
    def _given(self, values: Tensor | None, where: ExpertMask | None, weight: Tensor, one_by_one: bool):
        """Within the block the module finds ``weight`` (W + S as stored) in the place of its parameter."""
        trained = values is not None and values.requires_grad
        given = weight
        if torch.is_grad_enabled() and (trained or self._watchers):
            watchers = [watcher for watcher, _ in self._watchers]
            check = partial(self._check_held, values, where.mask) if values is not None and self.in_place else None
            use = ExpertUse(weight, self.transposed, values, where, watchers, *([check] if check else []))
            one_by_one = one_by_one and not any(all_at_once for _, all_at_once in self._watchers)
            given = weight_in_graph(values, use, one_by_one)
        elif values is not None and self.in_place:
            # the parameter itself holds W + S
            yield
            return
        with replaced(self.base_layer, self.parameter_name, given):
            yield

    def _hold_for_backward(self, values: Tensor, mask: Mask, address: int) -> None:
        """Let the weight hold W + S until the backward pass that runs is over, and every other that needs it too."""
        backward = torch._C._current_graph_task_id()
        with WRITING:
            if self._holds_for(backward, values, mask):
                return
            # first: whoever is interrupted here leaves W
            at_end_of_backward(lambda: self._end_backward(backward))
            if not self._holds(values, mask):
                if self._undo_merge or self.stored_weight.data_ptr() != address:
                    raise SpftError(
                        f"{self.parameter_name} of the experts was merged or moved between a forward pass and its "
                        "backward pass, which multiplies by what it held then: merge and move after backward()"
                    )
                self.revert()
                self._write(values, mask, passes=set())
            self._written.passes.add(backward)

    def _holds_for(self, backward: int, values: Tensor, mask: Mask) -> bool:
        held = self._written
        return held is not None and held.is_for(backward) and self._holds(values, mask)

    def _end_backward(self, backward: int) -> None:
        with WRITING:
            held = self._written
            if held is not None and held.passes is not None:
                held.passes.discard(backward)
                if not held.passes:
                    self.revert()

    def _check_held(self, values: Tensor, mask: Mask) -> None:
        # a weight that was put back and written again since is held for other passes
        if not self._holds_for(torch._C._current_graph_task_id(), values, mask):
            raise SpftError(
                f"{self.parameter_name} of the experts did not hold W + S while a backward pass multiplied by it: run "
                "the backward passes of different adapters one after the other, and choose, save, merge or move no "
                "weights while another thread trains"
            )
