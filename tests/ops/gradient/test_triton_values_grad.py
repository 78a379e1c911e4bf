"""The kernel of the tiles against the float64 gradient, and the same bits from run to run."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.gradient.values_grad import compact_values_grad, values_grad
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.mask.plan import MULTIPLE, make_plan
from axolotl_spft.ops.mask.tiles import make_tiles
from tests.interpreter import DEVICE
from tests.ops.mask.test_tiles import clustered_mask

pytestmark = pytest.mark.kernel
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# tokens, out_features, in_features, nnz
CASES = [(1, 1, 1, 1), (37, 70, 65, 300), (64, 130, 40, 5200), (129, 3, 200, 150), (100, 200, 3, 77)]


def case(tokens, out_features, in_features, nnz, dtype, multiple=1):
    mask = clustered_mask(out_features, in_features, nnz)
    plan = make_plan(mask, in_features, multiple=multiple)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    grad_y = torch.randn(tokens, out_features, generator=generator).to(dtype)
    x_columns = select_columns(x, plan.columns, backend="torch")
    expected = compact_values_grad(grad_y.double(), x_columns.double(), mask, plan)
    tensors = {name: part.to(DEVICE) for name, part in plan._asdict().items() if isinstance(part, torch.Tensor)}
    mask = Mask(*(part.to(DEVICE) for part in mask))
    return mask, plan._replace(**tensors), grad_y.to(DEVICE), x_columns.to(DEVICE), expected


def assert_close(got, expected, dtype, tokens):
    assert got.dtype == dtype
    # sums in float32, then one rounding
    tolerance = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * tokens
    assert ((got.cpu().double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "nnz"), CASES)
@pytest.mark.parametrize("multiple", [1, MULTIPLE])
def test_gradient_equals_the_reference_within_rounding(tokens, out_features, in_features, nnz, dtype, multiple):
    mask, plan, grad_y, x_columns, expected = case(tokens, out_features, in_features, nnz, dtype, multiple)
    got = values_grad(grad_y, x_columns, mask, plan, backend="triton")
    assert_close(got, expected, dtype, tokens)
    assert torch.equal(got, values_grad(grad_y, x_columns, mask, plan, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 4])
@pytest.mark.parametrize("blocks", [(64, 64), (16, 32)])
def test_splits_and_blocks(dtype, splits, blocks):
    from axolotl_spft.ops.gradient.triton_values_grad import tiles_values_grad

    mask, plan, grad_y, x_columns, expected = case(201, 70, 65, 300, dtype)
    tiles = make_tiles(mask, plan, *blocks)
    # 201 tokens in 4 parts of 51 leave the last part short
    got = tiles_values_grad(grad_y, x_columns, tiles, splits=splits)
    assert_close(got, expected, dtype, 201)


def test_more_splits_than_tokens_and_no_tokens():
    from axolotl_spft.ops.gradient.triton_values_grad import tiles_values_grad

    mask, plan, grad_y, x_columns, expected = case(5, 70, 65, 300, torch.float32)
    assert_close(tiles_values_grad(grad_y, x_columns, make_tiles(mask, plan), splits=4), expected, torch.float32, 5)
    none = tiles_values_grad(grad_y[:0], x_columns[:0], make_tiles(mask, plan))
    assert torch.equal(none, torch.zeros_like(none))


def test_columns_in_their_own_order_are_put_in_that_of_the_tiles():
    mask, plan, grad_y, x_columns, expected = case(33, 64, 48, 2900, torch.float32)
    assert plan.columns is None
    assert make_tiles(mask, plan).columns is not None
    assert_close(values_grad(grad_y, x_columns, mask, plan, backend="triton"), expected, torch.float32, 33)


def test_what_no_entry_uses_does_not_matter():
    """A NaN in a column of dY that holds no entry stays out of the gradient."""
    mask, plan, grad_y, x_columns, expected = case(33, 300, 100, 40, torch.float32)
    unused = torch.ones(300, dtype=torch.bool)
    unused[plan.rows.cpu()] = False
    grad_y[:, unused.to(DEVICE)] = float("nan")
    assert_close(values_grad(grad_y, x_columns, mask, plan, backend="triton"), expected, torch.float32, 33)
