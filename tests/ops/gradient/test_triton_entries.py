"""The kernel that reads entries out of blocks equals plain torch."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.gradient.entries import entries_of
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions
from axolotl_spft.ops.mask.plan import make_plan
from tests.interpreter import DEVICE
from tests.ops.mask.test_tiles import clustered_mask

pytestmark = pytest.mark.kernel
# some rows and columns used, all used, a row of several blocks, columns of 32 bits
MASKS = {
    "some": clustered_mask(70, 65, 300),
    "all": mask_from_positions(torch.arange(12 * 9), 12, 9),
    "long": mask_from_positions(torch.arange(7, 1400), 2, 1000),
    "wide": mask_from_positions(torch.tensor([3, 65_590, 70_000]), 2, 65_600),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("block_entries", [100, 2**24])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_entries_are_bit_for_bit_the_reference(kind, block_entries, multiple, dtypes):
    mask = MASKS[kind]
    plan = make_plan(
        mask, 65_600 if kind == "wide" else {"some": 65, "all": 9, "long": 1000}[kind], block_entries, multiple
    )
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.randn(rows.stop - rows.start, plan.n_columns, generator=generator).to(dtypes[0])
        for rows, _ in plan.blocks()
    ]
    expected = entries_of(iter(blocks), mask, plan, dtypes[1], backend="torch")
    mask = Mask(*(part.to(DEVICE) for part in mask))
    plan = plan._replace(
        **{name: part.to(DEVICE) for name, part in plan._asdict().items() if isinstance(part, torch.Tensor)}
    )
    got = entries_of((block.to(DEVICE) for block in blocks), mask, plan, dtypes[1], backend="triton")
    assert got.dtype == dtypes[1]
    assert torch.equal(got.cpu(), expected)
