"""8-bit moments: many tensors at a time equal one at a time, bit for bit, and stay near 32-bit moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_spft import SparseAdamW
from axolotl_spft.optim import adamw_8bit
from axolotl_spft.optim.adamw import adamw_
from axolotl_spft.optim.moments import MOMENTS, absmax_name, read_moment, write_moment, zero_moments

SIZES = [1, 255, 256, 257, 1000, 3 * 256, 5000]
HYPERPARAMETERS = (1e-2, (0.9, 0.99), 1e-8, 0.1)


def states():
    return [zero_moments(size, torch.device("cpu")) | {"step": torch.zeros(())} for size in SIZES]


def one_at_a_time(values, grads, each):
    for value, grad, state in zip(values, grads, each):
        stored = [(name, state[name], state[absmax_name(name)]) for name in MOMENTS]
        moments = [read_moment(*one) for one in stored]
        adamw_([value], [grad], *([one] for one in moments), [state["step"]], *HYPERPARAMETERS)
        for one, moment in zip(stored, moments):
            write_moment(*one, moment)


@pytest.mark.parametrize("chunk", [256, 1024, 2**22])
def test_together_equals_one_at_a_time(monkeypatch, chunk):
    monkeypatch.setattr(adamw_8bit, "CHUNK_VALUES", chunk)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in SIZES]
    others, one, other = [value.clone() for value in values], states(), states()
    one[2]["step"] += 7
    other[2]["step"] += 7
    for _ in range(4):
        grads = [torch.randn(size, generator=generator) for size in SIZES]
        adamw_8bit.adamw_8bit_(values, grads, one, *HYPERPARAMETERS)
        one_at_a_time(others, grads, other)
    for value, expected in zip(values, others):
        assert torch.equal(value, expected)
    for state, expected in zip(one, other):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert one[2]["step"] == 11


def test_steps_stay_near_those_with_32_bits():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3000, generator=generator)
    trained = {bits: nn.Parameter(start.clone()) for bits in (8, 32)}
    optimizers = {bits: SparseAdamW([p], lr=1e-2, state_bits=bits) for bits, p in trained.items()}
    direction = torch.randn(3000, generator=generator)
    for _ in range(20):
        grad = direction + 0.5 * torch.randn(3000, generator=generator)
        for bits, parameter in trained.items():
            parameter.grad = grad.clone()
            optimizers[bits].step()
    moved = {bits: parameter.detach() - start for bits, parameter in trained.items()}
    assert (moved[8] - moved[32]).norm() < 0.1 * moved[32].norm()
    state = optimizers[8].state[trained[8]]
    held = sum(state[name].nbytes + state[absmax_name(name)].nbytes for name in MOMENTS)
    assert held <= 2.1 * 3000
