"""Tensors that accelerate's hooks keep elsewhere: on the host or the disk, and on the meta device in their module.

The hooks bring them in for their module's own ``forward`` only, and a sparse layer multiplies past that of its base
layer. So it asks here for what it needs, in the forward and in the backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from axolotl_spft.errors import SpftError


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings in the module's own tensors for its forward pass."""
    return "_hf_hook" in module.__dict__ and _offloading_hook(module) is not None


def _offloading_hook(module: nn.Module) -> Any | None:
    hook = module.__dict__.get("_hf_hook")
    # several hooks of one module are one that holds them in a sequence
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False) is True), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module's tensors are brought to; None for one that is not offloaded."""
    hook = _offloading_hook(module)
    if hook is None:
        return None
    device = hook.execution_device
    # accelerate takes a number for a GPU
    return torch.empty(0, device="cpu" if device is None else device).device


@contextmanager
def brought_in(module: nn.Module, quant_state: Any | None = None) -> Iterator[None]:
    """Within the block an offloaded module holds its tensors; nothing changes for others, or where it does already.

    Args:
        module: a base layer.
        quant_state: of `kept_quant_state`, for a base layer of 4 bits.

    Raises:
        SpftError: the scales of a base layer of 4 bits are lost.
    """
    hook = _offloading_hook(module)
    if hook is None or not any(tensor.is_meta for tensor in module._parameters.values() if tensor is not None):
        yield
        return
    if quant_state is not None:
        module.weight.quant_state = _copied(quant_state)
    if _is_lost(getattr(module.weight, "quant_state", None)):
        raise SpftError(
            "a 4-bit base layer was offloaded before it got its adapter, and bitsandbytes moves the scales of its "
            "weight along with it, to the meta device: offload the model after get_peft_model() or "
            "PeftModel.from_pretrained(), or keep its 4-bit layers on a device"
        )
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextmanager
def rewritten(module: nn.Module) -> Iterator[None]:
    """Within the block an offloaded module holds its tensors; those of the end are brought in from then on.

    Nothing changes for others, or where it holds them already, as within PEFT's `onload_layer`, which does the same.
    """
    hook = _offloading_hook(module)
    if hook is None or not any(tensor.is_meta for tensor in module._parameters.values() if tensor is not None):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in named_module_tensors(module)}
        hook.post_forward(module, None)


def kept_quant_state(base_layer: nn.Module) -> Any | None:
    """The scales of a 4-bit weight, in an object of their own: offloading the weight leaves them where they are."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return None if state is None or _is_lost(state) else _copied(state)


def _copied(state: Any) -> Any:
    """A quantization state with the same tensors, which bitsandbytes may move by themselves."""
    state = copy.copy(state)
    if state.nested:
        state.state2 = copy.copy(state.state2)
    return state


def _is_lost(state: Any | None) -> bool:
    return state is not None and state.absmax.is_meta


def tensor_in(container: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of an adapter, where it can be computed with; one that is offloaded can not be trained.

    Raises:
        SpftError: it has no memory anywhere.
    """
    # by its key and not by get(): DeepSpeed gathers a parameter that it has partitioned when it is looked up so
    held = container._parameters[name] if name in container._parameters else container._buffers[name]
    if not held.is_meta:
        return held
    hook = _offloading_hook(container)
    if hook is None or not hook.weights_map:
        raise SpftError(
            f"the adapter `{name}` lies on the meta device, which holds no numbers: load the adapter after the model "
            "has its weights, or call set_peft_model_state_dict(..., low_cpu_mem_usage=True)"
        )
    tensor = hook.weights_map[name].to(execution_device(container))
    return _NotTrained.apply(tensor.detach().requires_grad_(), name) if held.requires_grad else tensor


def fill_in(state_dict: MutableMapping[str, Tensor], prefix: str, container: nn.Module) -> None:
    """Put the tensors of an adapter that is offloaded into a state dict, which has got them from the meta device.

    Args:
        prefix: what the container's keys begin with.

    Raises:
        SpftError: one has no memory anywhere.
    """
    if is_offloaded(container):
        for name in (*container._parameters, *container._buffers):
            key = f"{prefix}{name}"
            if key in state_dict and state_dict[key].is_meta:
                state_dict[key] = tensor_in(container, name).detach()


def keep_resident(container: nn.Module) -> None:
    """Bring an adapter's tensors in for good: a hook would not know those that are added now."""
    if is_offloaded(container):
        from accelerate.hooks import remove_hook_from_module

        with torch.no_grad():
            for name, tensor in container._parameters.items():
                container._parameters[name] = nn.Parameter(tensor_in(container, name).detach(), tensor.requires_grad)
            for name in container._buffers:
                container._buffers[name] = tensor_in(container, name)
        remove_hook_from_module(container)


class _NotTrained(torch.autograd.Function):
    """The identity on values that are copied in for one pass: their gradient would be lost with the copy."""

    @staticmethod
    def forward(ctx, values: Tensor, adapter_name: str) -> Tensor:
        ctx.adapter_name = adapter_name
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise SpftError(
            f"the values of adapter `{ctx.adapter_name}` are offloaded, so they cannot be trained: offload the base "
            "model first and add the adapter afterwards, or take accelerate's hooks off with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)` before the optimizer is made"
        )
