"""Weights of more than 2^31 entries: positions and addresses beyond what 32 bits count.

The weight is a file of which only the pages that are touched exist.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.embedding import Lookup, embed, embedding_values_grad
from axolotl_spft.ops.mask.csr import mask_from_positions, positions
from axolotl_spft.ops.weight.scatter import add_at_, restore_, write_sum_
from axolotl_spft.ops.weight.sums import Sum, collect_sums, restore_sums_, write_sums_

ROWS, COLUMNS = 3, 2**30
AT = torch.tensor([0, 5, 2**30 + 7, 2**31 - 1, 2**31, 2**31 + 3, 3 * 2**30 - 1])
VALUES = torch.arange(1.0, len(AT) + 1)


@pytest.fixture
def flat(tmp_path):
    return torch.from_file(str(tmp_path / "weight"), shared=True, size=ROWS * COLUMNS)


def check(flat: torch.Tensor, transposed: bool, backend: str) -> None:
    mask = mask_from_positions(AT, ROWS, COLUMNS)
    places = AT % COLUMNS * ROWS + AT // COLUMNS if transposed else AT
    assert torch.equal(positions(mask, COLUMNS), AT) and torch.equal(positions(mask, COLUMNS, transposed), places)
    weight = flat.view(COLUMNS, ROWS) if transposed else flat.view(ROWS, COLUMNS)
    before = -VALUES.flip(0)
    flat[places] = before
    originals = torch.zeros_like(VALUES)
    sums = collect_sums([Sum(weight, mask, originals, VALUES, transposed)])[0]
    for write, restore in (
        (
            lambda: write_sum_(weight, mask, originals, VALUES, transposed, backend),
            lambda: restore_(weight, mask, originals, transposed, backend),
        ),
        (lambda: write_sums_(sums, backend), lambda: restore_sums_(sums, backend)),
    )[: 1 if backend == "torch" else 2]:
        write()
        assert torch.equal(originals, before) and torch.equal(flat[places], before + VALUES)
        restore()
        assert torch.equal(flat[places], before)
    add_at_(weight, mask, VALUES, transposed, backend)
    assert torch.equal(flat[places], before + VALUES)


@pytest.mark.parametrize("backend", ["torch", "c"])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_are_written_where_they_belong(flat, transposed, backend):
    check(flat, transposed, backend)


@pytest.mark.kernel
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernels_write_sums_where_they_belong(flat, transposed):
    check(flat, transposed, "triton")


def test_rows_of_an_embedding(flat):
    tokens, width = 70_000, 2**15
    weight = flat[: tokens * width].view(tokens, width)
    at = torch.tensor([3, (tokens - 1) * width, tokens * width - 1])
    mask, values = mask_from_positions(at, tokens, width), torch.tensor([1.0, 2.0, 3.0])
    weight[-1, :2] = torch.tensor([10.0, 20.0])
    ids = torch.tensor([[0, tokens - 1], [tokens - 1, 7]])
    got, expected = embed(ids, weight, values, mask), F.embedding(ids, weight).clone()
    expected[ids == tokens - 1] += F.one_hot(torch.tensor(0), width) * 2 + F.one_hot(torch.tensor(width - 1), width) * 3
    expected[0, 0, 3] += 1
    assert torch.equal(got, expected)
    grads = embedding_values_grad(torch.ones_like(got), ids, mask, Lookup(), torch.float32)
    assert grads.tolist() == [1, 2, 2]


def test_more_values_than_row_offsets_count_are_refused():
    with pytest.raises(SpftError, match=r"2,147,483,648 values in one matrix .* at most 2,147,483,647"):
        mask_from_positions(torch.zeros(1, dtype=torch.int64).expand(2**31), 2**20, 2**20)
