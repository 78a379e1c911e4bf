"""The scatter kernel equals plain torch bit for bit."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.mask.csr import Mask, empty_mask, mask_from_positions, positions
from axolotl_spft.ops.weight.scatter import add_at_, restore_, write_sum_
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel
LOW = [torch.bfloat16, torch.float16]
# of the weight, of the values
DTYPES = [*((low, low) for low in LOW), *((low, torch.float32) for low in LOW), (torch.float32,) * 2]
# shape, nnz: one entry, all entries, rows with none, rows of several blocks that end exactly and do not
CASES = [((1, 1), 1), ((7, 5), 35), ((61, 67), 200), ((3, 1024), 3072), ((2, 1500), 2500)]


def case(shape, nnz, dtypes):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtypes[0])
    values = (torch.randn(nnz, generator=generator) * 0.1).to(dtypes[1])
    mask = mask_from_positions(torch.randperm(weight.numel(), generator=generator)[:nnz].sort().values, *shape)
    return weight.to(DEVICE), Mask(*(part.to(DEVICE) for part in mask)), values.to(DEVICE)


@pytest.mark.parametrize(("shape", "nnz"), CASES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_scatter_is_bit_for_bit_the_reference(shape, nnz, dtypes, transposed):
    weight, mask, values = case(shape, nnz, dtypes)
    originals = weight.take(positions(mask, shape[1]))
    weight = weight.t().contiguous() if transposed else weight
    before = weight.clone()
    got, expected = weight.clone(), weight.clone()
    for changed, backend in ((got, "triton"), (expected, "torch")):
        kept = torch.zeros_like(originals)
        write_sum_(changed, mask, kept, values, transposed, backend=backend)
        assert torch.equal(kept, originals)
    assert torch.equal(got, expected)
    assert not torch.equal(got, weight)
    for backend in ("triton", "torch"):
        added = weight.clone()
        add_at_(added, mask, values, transposed, backend)
        assert torch.equal(added, expected)
        restore_(added, mask, originals, transposed, backend)
        assert torch.equal(added, before)


def test_wide_columns():
    weight, mask, values = case((2, 65_600), 40, (torch.float32, torch.float32))
    assert mask.columns.dtype == torch.int32
    expected = weight.clone()
    add_at_(weight, mask, values, backend="triton")
    add_at_(expected, mask, values, backend="torch")
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_ties_subnormals_and_infinities(dtype):
    info = torch.finfo(dtype)
    originals = torch.tensor([1, 1, 1 + info.eps, -1, info.tiny, info.max, info.max, 0.0, -0.0], dtype=dtype)
    values = torch.tensor([info.eps / 2, -info.eps / 4, info.eps / 2, -info.eps / 2, -info.tiny / 2, info.max,
                           -info.max, info.tiny / 4, -0.0])  # fmt: skip
    originals, values = originals.to(DEVICE), values.to(DEVICE)
    mask = mask_from_positions(torch.arange(values.numel(), device=DEVICE), 3, 3)
    got, expected = originals.view(3, 3).clone(), originals.view(3, 3).clone()
    write_sum_(got, mask, originals, values, backend="triton")
    write_sum_(expected, mask, originals, values, backend="torch")
    assert torch.equal(got, expected)


def test_no_entries():
    weight, _, _ = case((3, 4), 1, (torch.float32, torch.float32))
    before, none = weight.clone(), torch.zeros(0, device=DEVICE)
    mask = empty_mask(3, 4, torch.device(DEVICE))
    write_sum_(weight, mask, none, none, backend="triton")
    add_at_(weight, mask, none, backend="triton")
    assert torch.equal(weight, before)
