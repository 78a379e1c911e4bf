"""The entries of a mask, read out of dense blocks of its used rows and columns."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from axolotl_spft.ops.backends.dispatch import use_triton
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import Plan, block_slots


def entries_of(blocks: Iterable[Tensor], mask: Mask, plan: Plan, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """What ``blocks`` hold at the entries of ``mask``; a block is dropped before the next one is asked for.

    Args:
        blocks: for each of the plan's blocks of rows, (rows of the block, columns of the plan), contiguous.
        backend: see `axolotl_spft.ops.backends.dispatch`.

    Returns:
        (nnz) in ``dtype``.
    """
    entries = None
    for block, (rows, values) in zip(blocks, plan.blocks()):
        if entries is None:
            entries = torch.empty(mask.nnz, dtype=dtype, device=block.device)
        if use_triton(backend, block, entries):
            from axolotl_spft.ops.gradient import triton_entries

            triton_entries.read_entries(block, mask, plan, rows.start, entries)
        else:
            entries[values] = block.view(-1).index_select(0, block_slots(plan, mask, rows, values))
        del block
    return entries
