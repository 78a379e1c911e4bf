"""The bytes that autograd keeps between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class KeptBytes(NamedTuple):
    """Bytes of the storages that are kept, each counted once.

    ``by_adapted`` are those that an adapted layer keeps, whoever else keeps them too.
    """

    all: int
    by_adapted: int


def kept_for_backward(model: nn.Module, batch: Mapping[str, Tensor], targets: Collection[str]) -> KeptBytes:
    """What one forward pass keeps for backward, without parameters, buffers and the batch.

    Under gradient checkpointing that is what lies outside the checkpointed blocks, and their inputs.

    Args:
        targets: the last parts of the adapted layers' names.
    """
    owned = [*model.parameters(), *model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}
    by_adapted: dict[int, int] = {}
    depth = 0

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:  # else it is SHiRA's delta, whose values and indices are the adapter's own
            _count(tensor, own, kept)
            if depth:
                _count(tensor, own, by_adapted)
        return tensor

    def enter(*_) -> None:
        nonlocal depth
        depth += 1

    def leave(*_) -> None:
        nonlocal depth
        depth -= 1

    def checkpointed(_, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                _count(value, own, kept)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in targets:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                handle = module.register_forward_pre_hook(checkpointed, with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        loss = model(**batch).loss
    loss.backward()
    return KeptBytes(sum(kept.values()), sum(by_adapted.values()))


def _count(tensor: Tensor, own: set[int], counted: dict[int, int]) -> None:
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in own:
        counted[storage.data_ptr()] = storage.nbytes()
