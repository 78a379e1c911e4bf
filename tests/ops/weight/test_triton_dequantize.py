"""The kernel that dequantizes gives the bits that bitsandbytes gives."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit as by_bitsandbytes
from bitsandbytes.nn import Linear4bit, Params4bit

from axolotl_spft.ops.weight.dequantize import dequantize_4bit
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel


def quantized(shape, dtype, **options):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0], weight[-1, -1] = 0, 40
    return Params4bit(weight, requires_grad=False, **{"quant_type": "nf4"} | options).to(DEVICE)


@pytest.mark.parametrize("shape", [(1, 256), (64, 256), (33, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_bit_for_bit(shape, dtype, nested, blocksize):
    weight = quantized(shape, dtype, compress_statistics=nested, blocksize=blocksize)
    assert weight.quant_state.nested == nested
    expected = by_bitsandbytes(weight.data, weight.quant_state)
    got = dequantize_4bit(weight, backend="triton")
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert got.unique().numel() > 1


@pytest.mark.parametrize("shape", [(7, 9), (33, 130)])
def test_the_last_group_may_be_short(shape):
    weight = quantized(shape, torch.bfloat16, compress_statistics=False)
    state, packed = weight.quant_state, weight.data.flatten().to(torch.int32)
    codes = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.quant_state.shape.numel()]]
    expected = (codes * state.absmax.repeat_interleave(64)[: codes.numel()]).to(torch.bfloat16).view(shape)
    assert torch.equal(dequantize_4bit(weight, backend="triton"), expected)
    assert expected[-1, -1] == 40


def test_what_it_cannot_is_left_to_bitsandbytes():
    for other in (
        torch.ones(2, 2),
        quantized((4, 64), torch.bfloat16, quant_type="fp4"),
        quantized((4, 64), torch.bfloat16, quant_storage=torch.bfloat16),
    ):
        assert dequantize_4bit(other, backend="triton") is None
    assert dequantize_4bit(quantized((4, 64), torch.bfloat16).to("cpu")) is None


def test_a_weight_as_a_layer_stores_it():
    layer = Linear4bit(70, 30, quant_type="nf4", compute_dtype=torch.bfloat16).to(DEVICE)
    expected = by_bitsandbytes(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize_4bit(layer.weight, backend="triton"), expected)
    assert expected.shape == (30, 70)
