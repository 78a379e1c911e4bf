from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from axolotl_spft.ops.backends import products


@pytest.fixture
def lacking(monkeypatch):
    """A processor without instructions for 16-bit floats."""
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype: dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (5,), (1, 5), (2, 3, 5), (3, 7), (600, 33)])
@pytest.mark.parametrize("out_features", [1, 512, 1025])
def test_products_are_those_of_float64_rounded_once(lacking, dtype, shape, out_features):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(out_features, shape[-1]).to(dtype), torch.randn(out_features).to(dtype)
    exact = F.linear(x.double(), weight.double())
    # what the sum of the sizes gets wrong in float32, and one rounding
    sizes = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    allowed = 2**-20 * sizes + torch.finfo(dtype).eps * exact.abs()
    for got, expected in (
        (products.linear(x, weight, None), exact),
        (products.matmul(x, weight.t().contiguous()), exact),
        (products.linear(x, weight, bias), exact + bias.double()),
    ):
        assert got.dtype == dtype and got.shape == (*shape[:-1], out_features)
        assert ((got.double() - expected).abs() <= allowed + torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_one_token_is_multiplied_as_it_is_and_many_in_float32(lacking, monkeypatch, autocast):
    dtypes = []
    multiply = torch.Tensor.mm

    def watched(x, y):
        product = multiply(x, y)
        dtypes.append(product.dtype)
        return product

    monkeypatch.setattr(torch.Tensor, "mm", watched)
    weight = torch.ones(4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        products.linear(torch.ones(1, 1, 3, dtype=torch.bfloat16), weight, None)
        assert not dtypes
        products.linear(torch.ones(1, 2, 3, dtype=torch.bfloat16), weight, None)
        products.matmul(torch.ones(2, 4, dtype=torch.bfloat16), weight)
        assert dtypes == [torch.float32, torch.float32]
        products.linear(torch.ones(2, 3), weight.float(), None)
    assert len(dtypes) == 2


def test_bfloat16_lacks_instructions_where_the_processor_has_none():
    listed = Path("/proc/cpuinfo")
    flags = listed.read_text() if listed.exists() else ""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX") or "flags" not in flags:
        pytest.skip("only where Linux lists what an x86 processor has")
    assert products.lacks_instructions(torch.bfloat16) == ("avx512_bf16" not in flags)
    assert not products.lacks_instructions(torch.float32)
