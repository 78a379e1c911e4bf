"""Which implementation an operation uses, chosen per call from its tensors.

``auto`` takes a Triton kernel for CUDA tensors and a C kernel for tensors of the CPU where one can run, and plain torch
otherwise. ``torch``, ``triton`` and ``c`` are requests: one that cannot be met is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.backends.cpu_library import library

BACKENDS = ("auto", "torch", "triton", "c")
# the kernels compute in float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(backend: str, *tensors: Tensor) -> bool:
    """Whether an operation on floating point ``tensors`` of one device runs its Triton kernel.

    Raises:
        SpftError: ``backend`` is unknown, or is ``triton`` and the kernel cannot run on these tensors.
    """
    if backend == "auto":
        return tensors[0].is_cuda and _fit(tensors) and _why_not(tensors[0].device) is None
    if backend in ("torch", "c"):
        return False
    if backend != "triton":
        raise SpftError(f"backend: {backend!r} is unknown, it must be one of {', '.join(BACKENDS)}")
    reason = _why_not(tensors[0].device) if tensors[0].is_cuda else _why_not_interpreted(tensors[0].device)
    if reason is None and not _fit(tensors):
        dtypes = " or ".join(map(str, DTYPES))
        reason = f"the tensors are {_description(tensors)}; they must be contiguous, on one device and {dtypes}"
    if reason is not None:
        raise SpftError(f"backend: 'triton' cannot run: {reason}; use 'auto', which falls back to torch")
    return True


def use_c(backend: str, *tensors: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether an operation on floating point ``tensors`` runs its C kernel, that for ``dtype`` or the first one's.

    Raises:
        SpftError: ``backend`` is ``c`` and the kernel cannot run on these tensors.
    """
    if backend != "auto" and backend != "c":
        return False
    dtype = dtype or tensors[0].dtype
    runs = tensors[0].is_cpu and _fit(tensors) and library(dtype) is not None
    if backend == "c" and not runs:
        raise SpftError(
            f"backend: 'c' cannot run: the tensors are {_description(tensors)}; they must be contiguous, on the CPU "
            f"and {' or '.join(map(str, DTYPES))}, the kernel's own dtype {dtype} not float16, and there must be a C "
            "compiler; use 'auto', which falls back to torch"
        )
    return runs


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def blocks(number: int, size: int) -> int:
    """How many blocks of ``size`` hold ``number`` things; triton.cdiv takes as long as a launch."""
    return -(-number // size)


def _fit(tensors: tuple[Tensor, ...]) -> bool:
    for tensor in tensors:
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            return False
    return len(tensors) == 1 or all(tensor.device == tensors[0].device for tensor in tensors)


def _description(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_interpreted(device: torch.device) -> str | None:
    if not _installed():
        return "triton is not installed"
    if device.type != "cpu" or not interpreting():
        return f"the tensors are on {device}, kernels run on CUDA devices"
    return None


@functools.cache
def _why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA device, or None where a trial one does."""
    if not _installed():
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        from axolotl_spft.ops.backends.launch import run_trial

        run_trial(device)
    except Exception as error:
        reason = f"a trial kernel failed on {device} with {type(error).__name__}: {error}"
        warnings.warn(f"spft uses plain torch: {reason}", stacklevel=2)
        return reason
    return None
