"""The bytes that autograd keeps between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer


class KeptBytes(NamedTuple):
    """Bytes of the storages that are kept, each counted once.

    ``by_adapted`` are those that an adapted layer keeps, whoever else keeps them too.
    """

    all: int
    by_adapted: int


class _Storage(NamedTuple):
    """The memory of a tensor that was kept, while that tensor lives."""

    of: TensorWeakRef
    address: int
    size: int


def kept_for_backward(model: nn.Module, batch: Mapping[str, Tensor], targets: Collection[str]) -> KeptBytes:
    """What one forward pass keeps for backward, without parameters, buffers and the batch.

    Under gradient checkpointing that is what lies outside the checkpointed blocks, and their inputs.

    Args:
        targets: the last parts of the adapted layers' names.
    """
    owned = [*model.parameters(), *model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: list[_Storage] = []
    by_adapted: list[_Storage] = []
    depth = 0

    def pack(tensor: Tensor) -> Tensor:
        # an alias: an operation that keeps its own output would else keep itself alive
        tensor = tensor.detach()
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
    found = KeptBytes(_alive_bytes(kept), _alive_bytes(by_adapted))
    loss.backward()
    return found


def _count(tensor: Tensor, own: set[int], counted: list[_Storage]) -> None:
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in own:
        counted.append(_Storage(TensorWeakRef(tensor), storage.data_ptr(), storage.nbytes()))


def _alive_bytes(counted: list[_Storage]) -> int:
    # graphs that were dropped during the forward pass keep nothing, DoRA's norm of the weight for one
    return sum({storage.address: storage.size for storage in counted if storage.of() is not None}.values())
