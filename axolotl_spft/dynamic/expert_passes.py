"""Keeps what the passes through a module of experts began and ended with, and makes its weights' dense gradients later.

How a module multiplies its tokens by the weights of its experts, one by one or all in a grouped product, is its own
affair. So it runs again: on the inputs of then, with the values of then, back from the output gradients of then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from axolotl_spft.dynamic.kept_input import KeptInput
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import all_values, gathered
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
        device = matrix.weight_device
        total = torch.zeros(matrix.out_features, matrix.in_features, dtype=torch.float32, device=device)
        with ExitStack() as stack:
            # DeepSpeed may gather them with the block around the experts, which does not run here
            stack.enter_context(gathered(list(self.experts.parameters())))
            stack.callback(matrix.watch_gradient(adder_of_experts(total, None)))
            for each in self._passes:
                if matrix in each.values:
                    self._run_again(each, matrix, device)
        return total

    def _run_again(self, then: _Pass, matrix: ExpertMatrix, device: torch.device) -> None:
        args, kwargs = tree_map_only(Tensor, lambda kept: kept.to(device), (then.args, then.kwargs))
        autocast = torch.autocast(device.type, then.autocast, enabled=then.autocast is not None)
        with torch.enable_grad(), ExitStack() as stack:
            for other, values in then.values.items():
                stack.enter_context(other.computing_with(self._adapter_name, values))
            # of which nothing but the watcher's dense gradient is wanted
            values = then.values[matrix].detach().requires_grad_()
            stack.enter_context(matrix.computing_with(self._adapter_name, values))
            with autocast:
                y = self.experts(*args, **kwargs)
            torch.autograd.grad(y, values, then.grad_y.to(device), allow_unused=True)

    def _values_of(self, matrix: ExpertMatrix) -> Tensor:
        values = all_values(matrix.spft_values[self._adapter_name], Ranks.current())
        # micro-batches of one step have the same
        last = self._passes[-1].values.get(matrix) if self._passes else None
        return last if last is not None and torch.equal(last, values) else values.clone()
