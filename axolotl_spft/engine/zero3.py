"""Weights that DeepSpeed ZeRO-3 has partitioned over the ranks, used before its engine exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block every rank holds these parameters whole; afterwards they are in parts again, or as before."""
    with ExitStack() as stack:
        # DeepSpeed's own work on the parameters is nothing that a mode of the caller's should see
        with torch._C.DisableTorchFunction():
            # one by one: gathering them together would read all with the dtype of the first
            for parameter in parameters:
                # DeepSpeed refuses, since 0.19, to gather what a context around this one has gathered
                if not is_whole(parameter):
                    stack.enter_context(gather_params_ctx(parameter, modifier_rank=None))
        try:
            yield
        finally:
            with torch._C.DisableTorchFunction():
                stack.close()


@contextmanager
def writable(parameter: nn.Parameter) -> Iterator[None]:
    """Within the block every rank holds the parameter whole, and what all write into it stays.

    For a parameter that is partitioned before transformers knows of ZeRO-3, which PEFT's own asks.
    """
    if not is_partitioned(parameter):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of the parameter only."""
    return hasattr(parameter, "ds_id")


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether this rank holds all of the parameter now, because it is not partitioned or has been gathered."""
    return parameter.numel() == count_of(parameter)


def own_part(parameter: Tensor, rank: int) -> Tensor:
    """The entries that this rank looks after: all, or its part of a parameter that ZeRO-3 has partitioned."""
    if not is_partitioned(parameter):
        return parameter.detach()
    part = parameter.ds_tensor
    # the last parts are padded to the length of the others
    return part.detach().flatten()[: max(0, min(part.numel(), parameter.ds_numel - rank * part.numel()))]


def all_values(values: Tensor, ranks: Ranks) -> Tensor:
    """A vector of which each rank may hold a part, whole on every rank; all ranks must ask."""
    return ranks.concatenate(own_part(values, ranks.rank)) if is_partitioned(values) else values.detach()


def count_of(parameter: Tensor) -> int:
    """Entries of the whole parameter, also where ZeRO-3 has left this rank a part."""
    return getattr(parameter, "ds_numel", parameter.numel())


@torch.no_grad()
def overwrite(parameter: nn.Parameter, entries: Tensor, rank: int) -> None:
    """Give a parameter that ZeRO-3 has partitioned other ``entries`` (its count, flat), also where it is whole now."""
    own = own_part(parameter, rank)
    own.copy_(entries[rank * parameter.ds_tensor.numel() :][: own.numel()])
    if is_whole(parameter):
        parameter.copy_(entries.view(parameter.shape))


def gather_as_unit(module: nn.Module) -> None:
    """Let DeepSpeed's engine, made later, gather all weights below a module whenever it runs, and hook none inside.

    So it does by itself with the blocks of experts that it knows.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def gather_beside(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let DeepSpeed's engine, made later, gather these parameters too whenever ``module`` runs, forward or backward.

    It would gather the module's own alone, and not those of other modules that it reads without calling them.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in parameters:
        register_external_parameter(module, parameter)


@contextmanager
def gathered_while_used(model: nn.Module) -> Iterator[None]:
    """Within the block each module of a partitioned model holds its own parameters during its forward and backward.

    One module's parameters are alive at a time, as under DeepSpeed's own engine; nothing is left behind for it. The
    same holds for the backward pass of a backward pass that made a graph.
    """
    with ExitStack() as stack:
        for module in model.modules():
            parameters = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
            if parameters:
                _gather_around(module, parameters, stack)
        yield


class _Passage(torch.autograd.Function):
    """The identity, whose backward first calls ``act``; and whose second backward, on the way back, ``act_again``."""

    # read by the salience pass that differentiates twice
    differentiable_twice = True

    @staticmethod
    def forward(
        ctx, act: Callable[[], None], act_again: Callable[[], None] | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.act, ctx.act_again = act, act_again
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple:
        ctx.act()
        return None, None, *_passed(gradients, ctx.act_again)


def _passed(
    tensors: Sequence[Any], act: Callable[[], None] | None, act_again: Callable[[], None] | None = None
) -> list[Any]:
    """The same tensors; those that require a gradient have gone through `_Passage`."""
    passed = list(tensors)
    tracked = [i for i, x in enumerate(passed) if torch.is_grad_enabled() and _requires_grad(x)]
    if tracked and act is not None:
        for i, x in zip(tracked, _Passage.apply(act, act_again, *(passed[i] for i in tracked))):
            passed[i] = x
    return passed


def _gather_around(module: nn.Module, parameters: list[nn.Parameter], stack: ExitStack) -> None:
    held = stack.enter_context(ExitStack())

    def gather() -> None:
        held.close()
        held.enter_context(gathered(parameters))

    def before_forward(_, inputs: tuple) -> tuple:
        gather()
        # the module's backward is over where it comes to its inputs; a second one begins there
        return tuple(_passed(inputs, held.close, gather))

    def after_forward(_, inputs: tuple, output: Any) -> None:
        held.close()
        # not torch's hooks for backward: they make the output a view, which a loss may not write to
        if any(map(_requires_grad, inputs)):
            outputs = [*filter(_requires_grad, output if isinstance(output, (tuple, list)) else [output])]
            # a second backward is over where it comes to the gradient of the only output; of several, at the very end
            release = held.close if len(outputs) == 1 else None

            def at_output(gradient: Tensor) -> Tensor:
                gather()
                return _passed([gradient], release)[0]

            for y in outputs:
                y.register_hook(at_output)

    for handle in (module.register_forward_pre_hook(before_forward), module.register_forward_hook(after_forward)):
        stack.callback(handle.remove)


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
