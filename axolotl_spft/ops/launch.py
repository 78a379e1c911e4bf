"""Launches Triton kernels without Triton's own search for the compiled one.

That takes the host longer than the launch, and a forward pass on a GPU waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from axolotl_spft.ops.dispatch import launching_on

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
