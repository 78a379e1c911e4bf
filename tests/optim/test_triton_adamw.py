"""The AdamW kernel against torch's, alone and inside `SparseAdamW`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from axolotl_spft import SparseAdamW
from axolotl_spft.optim import sparse_adamw
from axolotl_spft.optim.adamw import adamw_low_precision_
from tests.interpreter import DEVICE

pytestmark = pytest.mark.kernel
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = torch.finfo(torch.float32).eps


def start(n, dtype, into, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(n, generator=generator)
    state = [master.to(dtype), master.to(dtype).float(), torch.zeros(n), torch.zeros(n), torch.zeros(())]
    values, master, *moments, step = (tensor.to(device) for tensor in state)
    weight = at = originals = None
    if into:
        weight = torch.randn(3, n, generator=generator).to(torch.bfloat16).to(device)
        at = torch.randperm(3 * n, generator=generator)[:n].sort().values.to(torch.int32).to(device)
        originals = weight.view(-1)[at.to(torch.int64)]
    return values, master, moments, step, (weight, at, originals) if into else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1024, 1500])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
@pytest.mark.parametrize("into", [False, True])
def test_steps_equal_the_reference_within_rounding(dtype, n, betas, into):
    # the reference on the CPU: on a GPU torch's own kernel takes 1 - beta in float32, which is off by 1e-5
    runs = {backend: start(n, dtype, into, device) for backend, device in (("triton", DEVICE), ("torch", "cpu"))}
    for number in range(1, 5):
        # gradients far apart in scale, some 0
        generator = torch.Generator().manual_seed(number)
        grad = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-3, 2, (n,), generator=generator)
        grad = (grad * (torch.rand(n, generator=generator) > 0.1)).to(dtype)
        for backend, (values, master, moments, step, target) in runs.items():
            adamw_low_precision_(
                values, grad.to(values.device), master, *moments, step, 0.01 / number, betas, 1e-8, 0.1, target,
                backend=backend,
            )  # fmt: skip
            assert step.item() == number
    (values, master, moments, _, target), (_, expected, expected_moments, _, _) = runs["triton"], runs["torch"]
    for got, wanted in zip((master, *moments), (expected, *expected_moments)):
        # some steps' rounding; where terms cancel it is relative to them
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-6, atol=EPS * max(1, wanted.abs().max().item()))
    assert torch.equal(values, master.to(dtype))
    if into:
        weight, at, originals = target
        assert torch.equal(weight.view(-1)[at.to(torch.int64)], (originals.float() + values.float()).to(weight.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_something_else_set_are_their_own_master_from_then_on(dtype):
    settings = 0.1, (0.9, 0.99), 1e-8, 0.2
    found = []
    for backend, device in (("triton", DEVICE), ("torch", "cpu")):
        values, master, moments, step, _ = start(1500, dtype, False, device)
        grad = torch.linspace(-1, 1, 1500, device=device).to(dtype)
        adamw_low_precision_(values, grad, master, *moments, step, *settings, backend=backend)
        before = master.clone()
        values[5:1200:3] = 7
        adamw_low_precision_(values, grad, master, *moments, step, 0.0, *settings[1:], backend=backend)
        before[5:1200:3] = 7
        assert torch.equal(master, before) and not torch.equal(master, master.to(dtype).float())
        assert torch.equal(values, master.to(dtype))
        found.append(master.cpu())
    torch.testing.assert_close(*found, rtol=2e-6, atol=1e-8)


def test_float32_values_are_their_own_master():
    values, _, moments, step, _ = start(77, torch.float32, False)
    expected, master, other, other_step, _ = start(77, torch.float32, False, "cpu")
    grad = torch.linspace(-1, 1, 77)
    settings = 0.1, (0.9, 0.99), 1e-8, 0.2
    adamw_low_precision_(values, grad.to(DEVICE), values, *moments, step, *settings, backend="triton")
    adamw_low_precision_(expected, grad, master, *other, other_step, *settings, backend="torch")
    torch.testing.assert_close(values.cpu(), expected, rtol=2e-6, atol=1e-8)


def test_the_first_steps_bias_correction_is_exact():
    """The first update is lr sign(g), whatever beta: 1 - beta^t in float32 would be off by one part in 10^4."""
    values, master, moments, step, _ = start(9, torch.float32, False)
    before = master.double()
    grad = torch.full((9,), 0.5, device=DEVICE)
    adamw_low_precision_(values, grad, master, *moments, step, 1.0, (0.9, 0.99999), 1e-12, 0.0, backend="triton")
    assert (before - master.double() - 1).abs().max() < 1e-6
    assert math.isclose(moments[1][0].item(), 0.25e-5, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimizer_with_the_kernel_does_what_it_does_without(dtype, monkeypatch):
    one, other = (nn.Parameter(torch.linspace(-1, 1, 50, device=device).to(dtype)) for device in (DEVICE, "cpu"))
    with_kernel, without = (SparseAdamW([each], lr=0.01, weight_decay=0.1) for each in (one, other))
    monkeypatch.setattr("axolotl_spft.optim.adamw.use_triton", lambda backend, *tensors: tensors[0] is one)
    monkeypatch.setattr(sparse_adamw, "use_triton", lambda backend, *tensors: tensors[0] is one)
    for number in range(3):
        grad = torch.randn(50, generator=torch.Generator().manual_seed(number)).to(dtype)
        one.grad, other.grad = grad.to(DEVICE, copy=True), grad
        with torch.no_grad():
            assert with_kernel._step_in_one_pass(one, with_kernel.param_groups[0])
        without.step()
    mine, theirs = with_kernel.state[one], without.state[other]
    assert set(mine) == set(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name].cpu(), theirs[name], rtol=2e-6, atol=1e-8)
    assert torch.equal(one.detach(), mine["master"].to(dtype))
