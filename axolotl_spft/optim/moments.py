"""Adam's moments in blockwise 8 bits, through bitsandbytes (Dettmers et al., ICLR 2022, arXiv 2110.02861)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
MOMENTS = ("exp_avg", "exp_avg_sq")


def absmax_name(moment: str) -> str:
    """Name of the state entry that holds a moment's scales: (ceil(n / 256)) float32."""
    return f"{moment}_absmax"


@functools.lru_cache(maxsize=8)
def _code(moment: str, device: torch.device) -> Tensor:
    """The 256 numbers that a byte stands for; the second moment has no sign."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=moment == "exp_avg").to(device)


@functools.lru_cache(maxsize=8)
def padding(moment: str, device: torch.device) -> Tensor:
    """A block of zeros: (256) uint8."""
    zero = int((_code(moment, device) == 0).nonzero()[0])
    return torch.full((BLOCK,), zero, dtype=torch.uint8, device=device)


def zero_moments(numel: int, device: torch.device) -> dict[str, Tensor]:
    """Both moments of ``numel`` values at 0: a byte a value and a scale for each block."""
    state = {}
    for moment in MOMENTS:
        state[moment] = padding(moment, device)[:1].repeat(numel)
        state[absmax_name(moment)] = torch.zeros(-(-numel // BLOCK), dtype=torch.float32, device=device)
    return state


def read_moment(moment: str, quantized: Tensor, absmax: Tensor) -> Tensor:
    """The float32 moment of a whole number of blocks (the last may be shorter)."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(quantized, absmax=absmax, code=_code(moment, quantized.device), blocksize=BLOCK)


def write_moment(moment: str, quantized: Tensor, absmax: Tensor, value: Tensor) -> None:
    """Store a float32 moment: the counterpart of `read_moment`."""
    from bitsandbytes.functional import quantize_blockwise

    stored, state = quantize_blockwise(value, code=_code(moment, quantized.device), blocksize=BLOCK)
    quantized.copy_(stored)
    absmax.copy_(state.absmax)
