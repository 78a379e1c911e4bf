"""A context that leaves no trace in the model and in the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

_PLAIN = (bool, int, float, str)


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Put the state of Python's, numpy's and torch's random generators back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def untouched_model(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter within the block.

    What is trained whole is frozen again whenever it runs: a loss that takes the adapter away and back, as DPO's does
    for its reference, has PEFT make it trained, and a checkpointed block has to compute the same twice.

    At the end requires_grad, gradients and buffers are put back, and what modules hold in plain numbers and words:
    their modes, and how far some have looked (the rotary embeddings that grow with the longest row).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    plain = [
        (module, {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)})
        for module in model.modules()
    ]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    whole = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    hooks = [module.register_forward_pre_hook(_freeze) for module in whole]
    try:
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(trained, gradients):
            parameter.requires_grad_(True)
            parameter.grad = gradient
        for module, attributes in plain:
            vars(module).update(attributes)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                # a forward pass may have put another in its place
                module._buffers[name] = buffer.copy_(before)


def _freeze(module: nn.Module, _: object) -> None:
    module.requires_grad_(False)
