"""The linear layer with a sparse delta in plain torch: the oracle of the tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from axolotl_spft.ops.mask.csr import Mask, positions


def dense_delta(values: Tensor, mask: Mask, in_features: int) -> Tensor:
    """S as a dense matrix: (out_features, in_features), the dtype of ``values``; differentiable."""
    flat = values.new_zeros(mask.out_features * in_features)
    return flat.index_put((positions(mask, in_features),), values).view(mask.out_features, in_features)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, mask: Mask) -> Tensor:
    """y = x (W + S)^T + b with x (..., in_features) and y (..., out_features), by autograd alone."""
    return F.linear(x, weight + dense_delta(values, mask, weight.shape[1]).to(weight.dtype), bias)
