"""A weight that bitsandbytes has quantized to 4 bits, as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.backends.dispatch import use_triton


def dequantize_4bit(weight: Tensor | None, backend: str = "auto") -> Tensor | None:
    """W (out_features, in_features) of a `bitsandbytes.nn.Params4bit`, in the dtype that it had before.

    Args:
        backend: see `axolotl_spft.ops.backends.dispatch`.

    Returns:
        New memory; None where there is no kernel for it, and bitsandbytes itself has to.
    """
    state = getattr(weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or weight.dtype != torch.uint8 or not weight.is_contiguous():
        return None
    scales = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (state.absmax,)
    if not use_triton(backend, state.code, *scales):
        return None
    from axolotl_spft.ops.weight.triton_dequantize import dequantize

    return dequantize(weight, state)
