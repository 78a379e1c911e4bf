"""The kernel that copies columns equals indexing."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.columns import select_columns
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "features", "n_columns"), [(1, 1, 1), (16, 300, 128), (37, 70, 200), (5, 9, 0)])
@pytest.mark.parametrize("column_dtype", [torch.int32, torch.int64])
def test_columns_in_any_order_and_repeated(tokens, features, n_columns, dtype, column_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=generator).to(dtype).to(DEVICE)
    columns = torch.randint(features, (n_columns,), generator=generator).to(column_dtype).to(DEVICE)
    got = select_columns(x, columns, backend="triton")
    assert got.is_contiguous()
    assert torch.equal(got, x[:, columns.to(torch.int64)])
