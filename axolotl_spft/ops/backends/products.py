"""Matrix products in the precision that the processor is fast at.

torch multiplies bfloat16 and float16 on a CPU without instructions for them 4 (with AVX512) to 100 times slower than
float32. There a product is taken in float32 and rounded once.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spft.ops.backends.presence import check_present

# of a product, made at a time in float32: as fast as all at once, without all of W in float32
_COLUMNS = 256


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
    """x y for x (..., n) and y (n, m) of one dtype."""
    check_present(x, weight=y)
    return _in_float32(x, y, None) if _pays_in_float32(x) else x.matmul(y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x (..., n), W (m, n) and b (m) of one dtype."""
    check_present(x, weight=weight, bias=bias)
    if _pays_in_float32(x):
        return _in_float32(x, weight.t(), bias)
    y = F.linear(x, weight, bias)
    # what a function of autograd's returns as a view cannot be changed in place afterwards
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _pays_in_float32(x: Tensor) -> bool:
    # a single row waits for W to be read, and converting W takes longer than that
    return product_dtype(x) != x.dtype and x.numel() > x.shape[-1]


def _in_float32(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    x_rows = x.reshape(-1, x.shape[-1])
    product = x.new_empty(*x.shape[:-1], y.shape[1])
    rows = product.view(len(x_rows), y.shape[1])
    wide = x_rows.float()
    # autocast would round both to 16 bits again
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, y.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            columns = y[:, part].float()
            rows[:, part] = wide.mm(columns) if bias is None else torch.addmm(bias[part].float(), wide, columns)
    return product
