"""The kernel that writes many weights equals writing each of them, bit for bit."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.mask.csr import empty_mask, positions
from axolotl_spft.ops.weight.scatter import write_sum_
from tests.interpreter import DEVICE
from tests.ops.weight.test_triton_scatter import CASES, case

pytestmark = pytest.mark.kernel
# of the weights, of the values; the last one, which is made of one case, in the same launch as the first
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture
def sums():
    from axolotl_spft.ops.weight.sums import Sum

    made = []
    cases = [*CASES, ((130, 3), 200)]
    for number, dtypes in enumerate(DTYPES):
        for shape, nnz in cases if number < 3 else cases[:1]:
            for transposed in (False, True):
                weight, mask, values = case(shape, nnz, dtypes)
                originals = weight.take(positions(mask, shape[1]))
                made.append(Sum(weight.t().contiguous() if transposed else weight, mask, originals, values, transposed))
    return made


def test_many_are_bit_for_bit_each(sums):
    from axolotl_spft.ops.weight.sums import collect_sums, restore_sums_, write_sums_

    expected, before = ([each.weight.clone() for each in sums] for _ in range(2))
    for weight, each in zip(expected, sums):
        write_sum_(weight, each.mask, each.originals.clone(), *each[3:], backend="torch")
        each.originals.zero_()
        assert not torch.equal(weight, each.weight)
    collected = collect_sums(sums)
    assert len(collected) == 3
    for alike in collected:
        write_sums_(alike, backend="triton")
    assert all(torch.equal(each.weight, weight) for each, weight in zip(sums, expected))
    for alike in collected:
        restore_sums_(alike, backend="triton")
    assert all(torch.equal(each.weight, weight) for each, weight in zip(sums, before))
    # and once more what is restored
    write_sums_(collected[0], backend="triton")
    assert torch.equal(sums[0].weight, expected[0])


def test_values_are_read_anew(sums):
    from axolotl_spft.ops.weight.sums import collect_sums, restore_sums_, write_sums_

    collected = collect_sums(sums[:2])
    for each in sums[:2]:
        each.values.add_(1)
        # and so are the weights
        each.weight.mul_(3)
        before, expected = each.weight.clone(), each.weight.clone()
        write_sum_(expected, *each[1:], backend="torch")
        for alike in collected:
            write_sums_(alike, backend="triton")
        assert torch.equal(each.weight, expected)
        for alike in collected:
            restore_sums_(alike, backend="triton")
        assert torch.equal(each.weight, before)


def test_a_weight_without_entries_among_others(sums):
    from axolotl_spft.ops.weight.sums import Sum, collect_sums, write_sums_

    weight, none = torch.ones(3, 4, device=DEVICE, dtype=torch.bfloat16), torch.zeros(0, device=DEVICE)
    empty = Sum(weight, empty_mask(3, 4, torch.device(DEVICE)), none.bfloat16(), none, False)
    (collected,) = collect_sums([empty, sums[0], empty])
    write_sums_(collected, backend="triton")
    assert (weight == 1).all()
