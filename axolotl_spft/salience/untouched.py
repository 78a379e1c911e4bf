"""A context that leaves no trace in the model and in the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


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
    """Freeze every parameter within the block; put requires_grad, gradients, buffers and modes back at the end."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, gradient in zip(trained, gradients):
            parameter.requires_grad_(True)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
