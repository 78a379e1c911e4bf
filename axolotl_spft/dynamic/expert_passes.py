"""Keeps what the passes through a module of experts began and ended with, and makes its weights' dense gradients later.

How a module multiplies its tokens by the weights of its experts, one by one or all in a grouped product, is its own
affair. So it runs again: on the inputs of then, with the values of then, back from the output gradients of then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from axolotl_spft.dynamic.kept_input import KeptInput
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.adders import adder_of_experts
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.experts import SpftExperts


class _Pass(NamedTuple):
    """A forward and its backward pass: what the module was given, in which autocast, S of then, and dY."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None
    values: dict[ExpertMatrix, Tensor]
    grad_y: Tensor


class ExpertPasses:
    """The passes through one module of experts.

    Args:
        name: of the module.
        adapter_name: of the values.
        is_trained: whether a pass that has just run trains a matrix.
        place: puts a tensor where it is to be kept.
    """

    def __init__(
        self,
        name: str,
        experts: SpftExperts,
        adapter_name: str,
        is_trained: Callable[[ExpertMatrix], bool],
        place: Callable[[Tensor], Tensor],
    ):
        self.experts, self._name, self._adapter_name = experts, name, adapter_name
        self._is_trained, self._place = is_trained, place
        self._passes: list[_Pass] = []

    def forget(self) -> None:
        """Let go of what was collected."""
        self._passes = []

    def count(self, matrix: ExpertMatrix) -> int:
        """How many backward passes that train a matrix were collected."""
        return sum(matrix in each.values for each in self._passes)

    def after_forward(self, _: SpftExperts, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        """A forward hook."""
        trained = [matrix for matrix in self.experts.matrices if self._is_trained(matrix)]
        if not torch.is_grad_enabled() or not trained:
            return
        if not isinstance(y, Tensor):
            raise SpftError(
                f"{self._name} gives more than one tensor, and `reselect` knows experts of one: leave `reselect` or "
                "`target_parameters` out"
            )
        if not y.requires_grad:
            return
        held = tree_map_only(Tensor, KeptInput, (args, kwargs))
        device = y.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def keep(grad_y: Tensor) -> None:
            kept = tree_map_only(KeptInput, lambda each: each.keep(self._name, self._place), held)
            values = {matrix: self._values_of(matrix) for matrix in trained}
            self._passes.append(_Pass(*kept, autocast, values, self._place(grad_y.detach())))

        y.register_hook(keep)

    def gradient(self, matrix: ExpertMatrix) -> Tensor:
        """dW of a matrix, of all passes: (experts x out_features, in_features) float32."""
        device, parameter = matrix.weight_device, matrix.spft_values[self._adapter_name]
        total = torch.zeros(matrix.out_features, matrix.in_features, dtype=torch.float32, device=device)
        stop_watching = matrix.watch_gradient(adder_of_experts(total, None))
        try:
            for each in self._passes:
                if matrix not in each.values:
                    continue
                args, kwargs = tree_map_only(Tensor, lambda kept: kept.to(device), (each.args, each.kwargs))
                autocast = torch.autocast(device.type, each.autocast, enabled=each.autocast is not None)
                with torch.enable_grad(), self._holding(each.values):
                    with autocast:
                        y = self.experts(*args, **kwargs)
                    # the gradients of the parameters are no concern of the run's
                    torch.autograd.grad(y, parameter, each.grad_y.to(device), allow_unused=True)
        finally:
            stop_watching()
        return total

    def _values_of(self, matrix: ExpertMatrix) -> Tensor:
        values = matrix.spft_values[self._adapter_name].detach()
        # micro-batches of one step have the same
        last = self._passes[-1].values.get(matrix) if self._passes else None
        return last if last is not None and torch.equal(last, values) else values.clone()

    @contextmanager
    def _holding(self, values: dict[ExpertMatrix, Tensor]) -> Iterator[None]:
        """Within the block the matrices have values of before."""
        own = {matrix: matrix.spft_values[self._adapter_name].detach() for matrix in values}
        now = {matrix: each.clone() for matrix, each in own.items()}
        try:
            for matrix, each in own.items():
                each.copy_(values[matrix])
            yield
        finally:
            for matrix, each in own.items():
                each.copy_(now[matrix])
