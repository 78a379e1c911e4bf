"""The gradient of the values as one dot product over the tokens for each entry.

Of a product of rows and columns it computes nothing but the entries, at the speed of vectors rather than of matrices:
it pays where entries are few among the used rows and columns, as with a random mask. For CPUs.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from axolotl_spft.ops.backends import cpu
from axolotl_spft.ops.backends.dispatch import use_c
from axolotl_spft.ops.backends.products import cast, lacks_instructions
from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan, column_ranks

# multiply-adds of a large matrix product that take as long as one of the C kernel, and of `torch.sparse.sampled_addmm`
_LEAD_OVER_KERNEL = 8  # float32 with AVX512: 8; bfloat16 with AMX: 8 to 16 take a step the same time
_LEAD_OF_VECTORS = 8  # float32: 80 against 19 GFLOP/s on two cores with AVX2, and what transposing takes
_LEAD_OF_WIDE_VECTORS = 24  # float32 with AVX512: a whole step is fastest from 16 to 32
_LEAD_OF_TILES = 200  # halves with AMX: a whole step is faster with 200 than with 8 to 50
_HALVES = (torch.bfloat16, torch.float16)


def sampling_pays(plan: Plan, nnz: int, grad_y: Tensor) -> bool:
    """Whether `sampled_values_grad` takes less time than the product of rows and columns; both grow with the tokens."""
    if grad_y.is_cuda:
        return False
    return nnz * _product_lead(grad_y.dtype, use_c("auto", grad_y)) < plan.n_rows * plan.n_columns


@functools.cache
def _product_lead(dtype: torch.dtype, has_kernel: bool) -> int:
    """How many times as fast as a sampled product a matrix product of ``dtype`` is, for each multiply-add."""
    if has_kernel:
        return _LEAD_OVER_KERNEL
    if dtype in _HALVES and not lacks_instructions(dtype) and torch.cpu._is_amx_tile_supported():
        return _LEAD_OF_TILES
    return _LEAD_OF_WIDE_VECTORS if torch.backends.cpu.get_cpu_capability() == "AVX512" else _LEAD_OF_VECTORS


def sampled_values_grad(
    grad_y: Tensor, kept: Tensor, mask: Mask, plan: Plan, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """dV = (dY^T X)[mask]; sums in float32 (float64 for such tensors).

    Args:
        grad_y: dY, (tokens, out_features).
        kept: X[:, plan.columns], (tokens, columns).
        dtype: of the result; by default that of ``grad_y``.
        backend: see `axolotl_spft.ops.backends.dispatch`.

    Returns:
        (nnz) in ``dtype``.
    """
    dtype = dtype or grad_y.dtype
    if use_c(backend, grad_y):
        return cast(cpu.sampled_values_grad(grad_y, kept, mask, plan), dtype)
    left, right = _transposed(select_columns(grad_y, plan.rows)), _transposed(kept)
    _hear_of_the_beta_once()
    entries = torch.sparse_csr_tensor(
        plan.offsets, column_ranks(plan, mask.columns), left.new_zeros(mask.nnz), (len(left), len(right)),
        check_invariants=False,
    )  # fmt: skip
    return torch.sparse.sampled_addmm(entries, left, right.t(), beta=0.0).values().to(dtype)


def _transposed(x: Tensor) -> Tensor:
    # the product would copy anything else, and take longer for it
    return x.t().contiguous().to(x.dtype if x.dtype == torch.float64 else torch.float32)


@functools.cache
def _hear_of_the_beta_once() -> None:
    """Have torch's warning that sparse tensors are in beta, which it gives once, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))
