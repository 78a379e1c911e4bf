"""Launches Triton kernels without Triton's own search for the compiled one.

That takes the host longer than the launch, and a forward pass on a GPU waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_HERE = nullcontext()
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    integers: Sequence[int] = (),
    constants: Sequence[Any] = (),
    **options: Any,
) -> None:
    """Run ``kernel``, whose parameters are tensors, then integers, then constants, on the device of the tensors.

    ``options`` are Triton's, as ``num_warps``.
    """
    device = tensors[0].device
    # all that Triton compiles a kernel anew for
    key = (
        kernel, device, *constants, *options.items(),
        *[(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors],
        *[(number == 1, number % 16 == 0, number < 2**31) for number in integers],
    )  # fmt: skip
    compiled = _compiled.get(key)
    with launching_on(device):
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*tensors, *integers, *constants)
            return
        compiled = kernel[grid](*tensors, *integers, *constants, **options)
    if compiled is not None:  # None where kernels are interpreted
        _compiled[key] = compiled


def launching_on(device: torch.device) -> AbstractContextManager:
    """Where Triton launches kernels on tensors of ``device``: by itself it takes the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@triton.jit
def _trial_kernel(target):
    tl.store(target, 1.0)


def run_trial(device: torch.device) -> None:
    """Run a kernel that does next to nothing on a CUDA device.

    Triton builds its launcher with the system's C compiler at the first launch, and a machine may have none: what
    Triton then raises is raised here.
    """
    launch(_trial_kernel, (1,), (torch.zeros(1, device=device),))
