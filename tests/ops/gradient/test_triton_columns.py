"""The kernels that copy columns, and make those of a norm's output, equal plain torch."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.gradient.columns import select_columns, select_normed_columns
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "features", "n"), [(1, 1, 1), (7, 30, 11), (8, 700, 256), (33, 90, 515), (5, 4, 0)])
def test_copies_are_the_columns(dtype, index, tokens, features, n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    columns = torch.randint(features, (n,), generator=generator).sort().values
    got = select_columns(x.to(DEVICE), columns.to(DEVICE, index), backend="triton")
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), x[:, columns])


def test_leading_dimensions_are_tokens():
    x = torch.randn(3, 5, 40, device=DEVICE)
    columns = torch.tensor([0, 7, 39], dtype=torch.int32, device=DEVICE)
    assert torch.equal(select_columns(x, columns, backend="triton"), x.view(15, 40)[:, columns.long()])


def test_special_numbers_are_copied_bit_for_bit():
    x = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]], device=DEVICE)
    got = select_columns(x, torch.arange(4, device=DEVICE, dtype=torch.int32), backend="triton")
    assert torch.equal(got.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("all_columns", [False, True])
@pytest.mark.parametrize(("tokens", "features", "n"), [(1, 1, 1), (7, 30, 11), (3, 700, 515), (33, 90, 16), (0, 5, 4)])
def test_columns_of_a_norm_have_the_bits_of_torch(dtype, rounds, all_columns, tokens, features, n):
    generator = torch.Generator().manual_seed(0)
    h, scale = torch.randn(tokens, features, generator=generator), torch.rand(tokens, 1, generator=generator)
    columns = torch.randint(features, (n,), generator=generator, dtype=torch.int32).sort().values
    weight = torch.randn(features if all_columns else n, generator=generator)
    arguments = [None if all_columns and tensor is columns else tensor for tensor in (h, scale, weight, columns)]
    expected = select_normed_columns(*arguments, dtype, rounds, backend="torch")
    on_device = [tensor if tensor is None else tensor.to(DEVICE) for tensor in arguments]
    got = select_normed_columns(*on_device, dtype, rounds, backend="triton")
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), expected)
