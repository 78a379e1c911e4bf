"""CSR masks and their plans against dense boolean masks."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.branch import add_sparse_branch
from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.gradient.sampled import sampled_values_grad
from axolotl_spft.ops.gradient.values_grad import compact_values_grad, values_grad
from axolotl_spft.ops.mask.csr import (
    Mask,
    column_dtype,
    empty_mask,
    mask_from_positions,
    positions,
    problems_of,
    row_indices,
    used_columns,
    used_rows,
)
from axolotl_spft.ops.mask.plan import block_slots, make_plan
from axolotl_spft.ops.reference import dense_delta


@pytest.fixture(params=[(5, 7, 0.3), (1, 1, 1.0), (40, 3, 0.05), (3, 40, 0.9), (2, 65_537, 0.0001)])
def dense(request):
    rows, columns, share = request.param
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) <= share
    drawn[-1, -1] = True
    return drawn


def test_mask_round_trip(dense):
    at = dense.flatten().nonzero().squeeze(1)
    mask = mask_from_positions(at, *dense.shape)
    assert torch.equal(positions(mask, dense.shape[1]), at)
    transposed = positions(mask, dense.shape[1], transposed=True)
    assert torch.equal(transposed.sort().values, dense.t().flatten().nonzero().squeeze(1))
    assert torch.equal(transposed.argsort(), (at % dense.shape[1]).argsort(stable=True))
    assert row_indices(mask.row_offsets, mask.nnz).tolist() == dense.nonzero()[:, 0].tolist()
    assert torch.equal(used_rows(mask), dense.any(1).nonzero().squeeze(1))
    assert torch.equal(used_columns(mask, dense.shape[1]), dense.any(0).nonzero().squeeze(1))
    assert mask.columns.dtype == column_dtype(dense.shape[1])
    assert mask.row_offsets.dtype == torch.int32
    assert problems_of(mask, torch.zeros(mask.nnz), *dense.shape) == []
    values = torch.arange(1.0, mask.nnz + 1)
    assert torch.equal(dense_delta(values, mask, dense.shape[1])[dense], values)


def test_column_dtype_follows_the_file_format():
    assert column_dtype(65_536) == torch.uint16
    assert column_dtype(65_537) == torch.int32


def test_empty_mask():
    mask = empty_mask(4, 6)
    assert mask.nnz == 0
    assert mask.out_features == 4
    assert problems_of(mask, torch.zeros(0), 4, 6) == []


@pytest.mark.parametrize("block_entries", [1, 6, 2**24])
@pytest.mark.parametrize("multiple", [1, 4])
def test_values_gradient_is_the_dense_one_at_the_mask(dense, block_entries, multiple):
    if dense.shape[1] > 1000 and block_entries == 1:
        pytest.skip("one product per row")
    mask = mask_from_positions(dense.flatten().nonzero().squeeze(1), *dense.shape)
    plan = make_plan(mask, dense.shape[1], block_entries, multiple)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, dense.shape[1], generator=generator, dtype=torch.float64)
    grad_y = torch.randn(3, 3, dense.shape[0], generator=generator, dtype=torch.float64)
    expected, grad_y = (grad_y.view(9, -1).t() @ x)[dense], grad_y.view(9, -1)
    torch.testing.assert_close(values_grad(grad_y, select_columns(x, plan.columns), mask, plan), expected)
    for product in (compact_values_grad, sampled_values_grad):
        torch.testing.assert_close(product(grad_y, select_columns(x, plan.columns), mask, plan), expected)
    blocks = list(plan.blocks())
    assert [row for rows, _ in blocks for row in range(plan.n_rows)[rows]] == list(range(plan.n_rows))
    assert [value for _, values in blocks for value in range(mask.nnz)[values]] == list(range(mask.nnz))
    for indices, number in ((plan.rows, plan.n_rows), (plan.columns, plan.n_columns)):
        assert indices is None or indices.numel() == number
        assert indices is None or number % multiple == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [compact_values_grad, sampled_values_grad])
def test_values_gradient_is_rounded_once(dtype, product):
    mask = mask_from_positions(torch.arange(0, 40 * 30, 7), 40, 30)
    plan = make_plan(mask, 30)
    x, grad_y = (torch.randn(50, size).to(dtype) for size in (30, 40))
    got = product(grad_y, x, mask, plan)
    expected = (grad_y.double().t() @ x.double()).flatten()[::7]
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(
    ("shared", "kept"), [(None, [2, 5, 8]), ([0, 2, 4, 5, 8], [0, 2, 4, 5, 8]), (list(range(10)), None)]
)
def test_backward_is_given_the_columns_that_layers_share(shared, kept):
    mask = mask_from_positions(torch.tensor([5, 8, 12, 15]), 3, 10)
    shared = None if shared is None else torch.tensor(shared, dtype=torch.int32)
    plan = make_plan(mask, 10, columns=shared, multiple=1)
    assert (None if plan.columns is None else plan.columns.tolist()) == kept
    x, grad_y = torch.randn(4, 10), torch.randn(4, 3)
    given = select_columns(x, plan.columns)
    assert given.shape[1] == plan.n_columns
    expected = (grad_y.t() @ x).flatten()[[5, 8, 12, 15]]
    torch.testing.assert_close(values_grad(grad_y, given, mask, plan), expected)


def test_block_slots_say_where_entries_stand():
    mask = mask_from_positions(torch.tensor([5, 8, 12, 22, 25]), 3, 10)
    plan = make_plan(mask, 10, multiple=1)
    assert plan.columns.tolist() == [2, 5, 8]
    assert [block_slots(plan, mask, *block).tolist() for block in plan.blocks()] == [[1, 2, 3, 6, 7]]
    plan = make_plan(mask, 10, block_entries=6, multiple=1)
    assert [block_slots(plan, mask, *block).tolist() for block in plan.blocks()] == [[1, 2, 3], [0, 1]]


@pytest.mark.parametrize(("multiple", "offsets"), [(1, [0, 2, 5, 6]), (4, [0, 2, 5, 6, 6])])
def test_offsets_say_which_values_each_row_of_the_plan_has(multiple, offsets):
    mask = mask_from_positions(torch.tensor([15, 18, 32, 35, 38, 99]), 10, 10)
    plan = make_plan(mask, 10, multiple=multiple)
    assert plan.rows.tolist() == [1, 3, 9, 9][: plan.n_rows]
    assert plan.offsets.tolist() == offsets


def test_rows_are_not_copied_where_most_are_used():
    for used, copied in ((6, True), (7, False)):
        mask = mask_from_positions(torch.arange(used) * 10 + 3, 8, 10)
        plan = make_plan(mask, 10, multiple=1)
        assert (plan.rows is not None) == copied
        assert plan.offsets.tolist() == [*range(used + 1), *([] if copied else [used])]
        x, grad_y = torch.randn(4, 10), torch.randn(4, 8)
        got = values_grad(grad_y, select_columns(x, plan.columns), mask, plan)
        torch.testing.assert_close(got, (grad_y.t() @ x)[:used, 3])


@pytest.mark.parametrize("block_entries", [1, 2**24])
@pytest.mark.parametrize("multiple", [1, 2])
def test_branch_adds_x_times_the_transposed_delta(block_entries, multiple):
    mask = mask_from_positions(torch.tensor([1, 5, 9, 20, 34]), 5, 7)
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    plan = make_plan(mask, 7, block_entries, multiple)
    torch.testing.assert_close(add_sparse_branch(y, x, values, mask, plan), y + x @ dense_delta(values, mask, 7).t())
    assert torch.autograd.gradcheck(lambda *inputs: add_sparse_branch(*inputs, mask, plan), (y, x, values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_select_columns(dtype):
    x = torch.randn(2, 3, 10).to(dtype)
    columns = torch.tensor([0, 4, 9])
    assert torch.equal(select_columns(x, columns), x.view(6, 10)[:, columns])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m, v: (m._replace(columns=m.columns.to(torch.int64)), v), "columns are torch.int64"),
        (lambda m, v: (m._replace(row_offsets=m.row_offsets.float()), v), "row offsets are torch.float32"),
        (lambda m, v: (m, v.int()), "they must be floating point"),
        (lambda m, v: (m, v[:-1]), "3 columns but 2 values"),
        (lambda m, v: (m._replace(row_offsets=m.row_offsets[:-1]), v), "must be out_features + 1"),
        (lambda m, v: (m._replace(row_offsets=m.row_offsets.flip(0)), v), "must rise from 0"),
        (lambda m, v: (m._replace(row_offsets=m.row_offsets + 1), v), "must rise from 0"),
        (lambda m, v: (m._replace(columns=torch.tensor([0, 1, 6], dtype=torch.uint16)), v), "outside 0..5"),
        (lambda m, v: (m._replace(columns=torch.tensor([1, 0, 2], dtype=torch.uint16)), v), "must ascend"),
        (lambda m, v: (m._replace(columns=torch.tensor([1, 1, 2], dtype=torch.uint16)), v), "must ascend"),
        (lambda m, v: (m, torch.tensor([0.0, float("nan"), 1.0])), "NaN or infinite"),
        (lambda m, v: (m, torch.tensor([0.0, float("inf"), 1.0])), "NaN or infinite"),
        (lambda m, v: (m, v[None]), "one dimension"),
    ],
)
def test_every_damage_is_named(change, expected):
    mask = Mask(torch.tensor([0, 1, 2], dtype=torch.uint16), torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert problems_of(mask, torch.zeros(3), 3, 6) == []
    found = problems_of(*change(mask, torch.zeros(3)), 3, 6)
    assert len(found) == 1
    assert expected in found[0]
