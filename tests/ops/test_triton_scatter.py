"""The scatter kernel equals plain torch bit for bit."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.scatter import add_at_, assign_sum_
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel
LOW = [torch.bfloat16, torch.float16]
# of the weight, of the values
DTYPES = [*((low, low) for low in LOW), *((low, torch.float32) for low in LOW), (torch.float32,) * 2]
# shape, nnz: one entry, all entries, blocks that end exactly and do not
CASES = [((1, 1), 1), ((7, 5), 35), ((61, 67), 1024), ((61, 67), 1025), ((40, 90), 2500)]


def case(shape, nnz, dtypes, position_dtype=torch.int32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtypes[0])
    values = (torch.randn(nnz, generator=generator) * 0.1).to(dtypes[1])
    at = torch.randperm(weight.numel(), generator=generator)[:nnz].sort().values.to(position_dtype)
    return weight.to(DEVICE), at.to(DEVICE), values.to(DEVICE)


@pytest.mark.parametrize(("shape", "nnz"), CASES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_scatter_is_bit_for_bit_the_reference(shape, nnz, dtypes, position_dtype):
    weight, at, values = case(shape, nnz, dtypes, position_dtype)
    originals = weight.view(-1)[at.to(torch.int64)]
    got, expected = weight.clone(), weight.clone()
    for _ in range(2):
        assign_sum_(got, at, originals, values, backend="triton")
    assign_sum_(expected, at, originals, values, backend="torch")
    assert torch.equal(got, expected)
    added = weight.clone()
    add_at_(added, at, values, backend="triton")
    assert torch.equal(added, expected)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_ties_subnormals_and_infinities(dtype):
    info = torch.finfo(dtype)
    originals = torch.tensor([1, 1, 1 + info.eps, -1, info.tiny, info.max, info.max, 0.0, -0.0], dtype=dtype)
    values = torch.tensor([info.eps / 2, -info.eps / 4, info.eps / 2, -info.eps / 2, -info.tiny / 2, info.max,
                           -info.max, info.tiny / 4, -0.0])  # fmt: skip
    originals, values = originals.to(DEVICE), values.to(DEVICE)
    at = torch.arange(values.numel(), device=DEVICE, dtype=torch.int32)
    got, expected = torch.zeros_like(originals), torch.zeros_like(originals)
    assign_sum_(got, at, originals, values, backend="triton")
    assign_sum_(expected, at, originals, values, backend="torch")
    assert torch.equal(got, expected)


def test_no_entries():
    weight, at, values = case((3, 4), 0, (torch.float32, torch.float32))
    before = weight.clone()
    assign_sum_(weight, at, values, values, backend="triton")
    add_at_(weight, at, values, backend="triton")
    assert torch.equal(weight, before)
