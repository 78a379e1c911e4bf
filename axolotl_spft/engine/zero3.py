"""Weights that DeepSpeed ZeRO-3 has partitioned over the ranks, used before its engine exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft.utils.integrations import gather_params_ctx
from torch import nn


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block every rank holds these parameters whole; they are partitioned again afterwards."""
    with ExitStack() as stack:
        # one by one: gathering them together would read all with the dtype of the first
        for parameter in parameters:
            stack.enter_context(gather_params_ctx(parameter, modifier_rank=None))
        yield


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of the parameter only."""
    return hasattr(parameter, "ds_id")


def gather_as_units(model: nn.Module, unit: type[nn.Module]) -> None:
    """Let DeepSpeed's engine, made later, gather all weights below each ``unit`` whenever that module runs.

    It would gather a module's own parameters only, but a sparse layer reads its base layer's and its values itself.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [unit])


@contextmanager
def gathered_while_used(model: nn.Module) -> Iterator[None]:
    """Within the block each module of a partitioned model holds its own parameters during its forward and backward.

    One module's parameters are alive at a time, as under DeepSpeed's own engine; nothing is left behind for it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            parameters = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
            if parameters:
                _gather_around(module, parameters, stack)
        yield


def _gather_around(module: nn.Module, parameters: list[nn.Parameter], stack: ExitStack) -> None:
    held = stack.enter_context(ExitStack())

    def gather(*_) -> None:
        held.close()
        held.enter_context(gathered(parameters))

    def release(*_) -> None:
        held.close()

    for handle in (
        module.register_forward_pre_hook(gather),
        module.register_forward_hook(release),
        module.register_full_backward_pre_hook(gather),
        module.register_full_backward_hook(release),
    ):
        stack.callback(handle.remove)
