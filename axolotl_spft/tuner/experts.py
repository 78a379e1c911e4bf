"""A module of experts that multiplies by W + S: its own forward pass, with other weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.base_weight import WRITING
from axolotl_spft.tuner.expert_matrix import ExpertMatrix

# transformers' ways to compute experts, which are made of torch's functions and have every gradient
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class SpftExperts(nn.Module):
    """A module of experts, with a child of each targeted parameter's name that holds its sparse deltas.

    The experts compute as their class does and as the model's ``experts_implementation`` says. Forward passes of
    several threads run one after the other.

    Args:
        base_layer: the module of the experts.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    @property
    def matrices(self) -> list[ExpertMatrix]:
        """The parameters with sparse deltas."""
        return [child for child in self._modules.values() if isinstance(child, ExpertMatrix)]

    def add_adapter(self, parameter_name: str, adapter_name: str) -> ExpertMatrix:
        """Give a parameter an empty adapter."""
        matrix = self._modules.get(parameter_name)
        if matrix is None:
            matrix = ExpertMatrix(self.base_layer, parameter_name, adapter_name)
            setattr(self, parameter_name, matrix)
        else:
            matrix.add_empty_adapter(adapter_name)
        return matrix

    def __getattr__(self, name: str) -> Any:
        # what models read of their experts beside calling them
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    # what is written and put back around a pass is no part of a graph
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        matrices = self.matrices
        before_backward: list[Callable[[], None]] = []
        # what stands in the place of the weights, and whether bitsandbytes keeps them, all threads see
        with WRITING, ExitStack() as stack:

            def begin(module: nn.Module, _: Any) -> None:
                if torch.is_grad_enabled() and any(matrix.is_used for matrix in matrices):
                    _check_implementation(module)
                one_by_one = _takes_one_by_one(module)
                found = [stack.enter_context(matrix.in_use(one_by_one)) for matrix in matrices]
                before_backward.extend(each for each in found if each is not None)

            # after the module's other hooks, which may gather its parameters
            handle = self.base_layer.register_forward_pre_hook(begin)
            stack.callback(handle.remove)
            y = self.base_layer(*args, **kwargs)
        if before_backward and torch.is_grad_enabled():
            for output in y if isinstance(y, (tuple, list)) else (y,):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda _: _call(before_backward))
        return y

    def _revert(self) -> None:
        for matrix in self.matrices:
            matrix.revert()

    def _apply(self, fn, recurse=True):
        # before the module of the experts is moved, cast or saved: what it holds then is W
        self._revert()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._revert()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._revert()
        super()._load_from_state_dict(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module of the experts itself, merged or not: called by PEFT."""
        self._revert()
        for matrix in self.matrices if merge else ():
            matrix.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def _call(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _check_implementation(module: nn.Module) -> None:
    """Raise where a kernel computes the experts that may give no gradient of their weights."""
    implementation = _implementation(module)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise SpftError(
            f"`experts_implementation: {implementation}` computes the experts, and whether it makes the gradient of "
            f"their weights, which `target_parameters` needs, is not known: use {', '.join(IMPLEMENTATIONS)}"
        )


def _takes_one_by_one(module: nn.Module) -> bool:
    """Whether it is transformers' loop over the experts that runs, and no kernel that wants tensors alone."""
    # a parametrized module's class is one that torch has made of the module's own
    if not any(kind.__module__.startswith("transformers.models.") for kind in type(module).__mro__):
        return False
    return _implementation(module) in (None, "eager")
