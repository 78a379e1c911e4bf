"""Matrix products in the precision that the processor is fast at.

torch multiplies bfloat16 and float16 on a CPU without instructions for them tens of times slower than float32. There a
product is taken in float32 and rounded once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)
# multiply-adds of a large matrix product that take as long as one of `torch.sparse.sampled_addmm`
_LEAD_OF_VECTORS = 8  # float32: 80 against 19 GFLOP/s on two cores with AVX2, and what transposing takes
_LEAD_OF_WIDE_VECTORS = 24  # float32 with AVX512: a whole step is fastest from 16 to 32
_LEAD_OF_TILES = 200  # halves with AMX: a whole step is faster with 200 than with 8 to 50


@functools.cache
def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies ``dtype`` without instructions for it."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are fastest."""
    return torch.float32 if x.device.type == "cpu" and lacks_instructions(x.dtype) else x.dtype


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


@functools.cache
def product_lead(dtype: torch.dtype) -> int:
    """How many times as fast as a sampled product a matrix product of ``dtype`` is, for each multiply-add."""
    has_tiles = dtype in _HALVES and not lacks_instructions(dtype) and torch.cpu._is_amx_tile_supported()
    if has_tiles:
        return _LEAD_OF_TILES
    return _LEAD_OF_WIDE_VECTORS if torch.backends.cpu.get_cpu_capability() == "AVX512" else _LEAD_OF_VECTORS
