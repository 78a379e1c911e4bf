"""Matrix products in the precision that the processor is fast at.

torch multiplies bfloat16 and float16 on a CPU without instructions for them 4 (AVX512) to 100 times slower than float32.
There a product is taken in float32 and rounded once.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies ``dtype`` without instructions for it."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported() or _emulates_bfloat16()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _emulates_bfloat16() -> bool:
    # torch counts any AVX512 as support
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are fastest."""
    return torch.float32 if x.device.type == "cpu" and lacks_instructions(x.dtype) else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; not asking torch where it is takes a tenth of the time, and layers ask often."""
    return x if x.dtype == dtype else x.to(dtype)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x y for x and y of one dtype."""
    dtype = product_dtype(x)
    return x.matmul(y) if dtype == x.dtype else x.to(dtype).matmul(y.to(dtype)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x, W and b of one dtype."""
    dtype = product_dtype(x)
    if dtype == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
