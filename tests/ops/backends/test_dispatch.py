"""The choice of an implementation, and a layer that runs on kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.backends import dispatch
from axolotl_spft.ops.backends.dispatch import use_triton
from axolotl_spft.tuner.layer import SpftLinear
from tests.interpreter import DEVICE
from tests.ops.mask.test_tiles import clustered_mask


def test_tensors_of_the_cpu_take_torch_without_a_look_at_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_fit", None)
    monkeypatch.setattr(dispatch, "_installed", None)
    assert not use_triton("auto", torch.zeros(1))
    assert not use_triton("torch", torch.zeros(1))


def test_requests_that_cannot_be_met_are_errors(monkeypatch):
    with pytest.raises(SpftError, match="backend: 'cuda' is unknown, it must be one of auto, torch, triton"):
        use_triton("cuda", torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SpftError, match="'triton' cannot run: the tensors are on cpu, kernels run on CUDA devices"):
        use_triton("triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("triton", torch.zeros(1))
    with pytest.raises(SpftError, match=r"torch.float32 on cpu, torch.float64 on cpu; they must be contiguous"):
        use_triton("triton", torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(SpftError, match="they must be contiguous"):
        use_triton("triton", torch.zeros(2, 3).t())
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(SpftError, match="triton is not installed"):
        use_triton("triton", torch.zeros(1))


@pytest.mark.kernel
@pytest.mark.parametrize("held_in_place", [True, False])
def test_a_layer_on_kernels_computes_what_it_does_without(held_in_place, monkeypatch):
    def run(kernels):
        generator = torch.Generator().manual_seed(0)
        base = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            base.weight.copy_(torch.randn(256, 256, generator=generator))
        mask = clustered_mask(256, 256, 500)
        layer = SpftLinear(base.requires_grad_(False).to(DEVICE), "default")
        layer.set_mask("default", mask, torch.randn(500, generator=generator).to(torch.bfloat16))
        layer.share_weight(not held_in_place)
        x = torch.randn(2, 20, 256, generator=generator).to(torch.bfloat16).to(DEVICE).requires_grad_()
        calls = []
        monkeypatch.setattr("axolotl_spft.ops.gradient.columns.use_triton", lambda *_: kernels)
        for entry in ("weight.scatter", "gradient.values_grad"):
            monkeypatch.setattr(f"axolotl_spft.ops.{entry}.use_triton", lambda *_: calls.append(1) or kernels)
        y = layer(x)
        grad_y = torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(DEVICE)
        gradients = torch.autograd.grad(y, (x, layer.spft_values["default"]), grad_y)
        return y, *gradients, len(calls)

    from axolotl_spft.ops.gradient import triton_values_grad

    monkeypatch.setattr("axolotl_spft.ops.mask.tiles.TILES_UP_TO", float("inf"))
    products = []
    kernel = triton_values_grad.tiles_values_grad
    monkeypatch.setattr(triton_values_grad, "tiles_values_grad", lambda *args: products.append(1) or kernel(*args))
    *got, calls = run(True)
    *expected, other_calls = run(False)
    # a weight that holds the sum for a pass is written and given back in each, and then come the values' gradients
    assert calls == other_calls == (5 if held_in_place else 3)
    assert products == [1]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=2**-7, atol=1e-3)
