"""`SparseAdamW` and the plain update function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from axolotl_spft import SparseAdamW
from axolotl_spft.errors import SpftConfigError, SpftFileError
from axolotl_spft.optim.adamw import adamw_


def test_adamw_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    values, first, second = (torch.zeros(7, dtype=torch.float32) for _ in range(3))
    values += torch.randn(7, generator=generator)
    w, m, v = values.double(), first.double(), second.double()
    step = torch.zeros(())
    lr, b1, b2, eps, decay = 0.1, 0.9, 0.99, 1e-6, 0.2
    for t in range(1, 6):
        g = torch.randn(7, generator=generator)
        adamw_([values], [g], [first], [second], [step], lr, (b1, b2), eps, decay)
        g = g.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = (1 - lr * decay) * w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        assert step.item() == t
    for got, expected in ((values, w), (first, m), (second, v)):
        assert (got.double() - expected).abs().max() < 1e-6


def test_no_state_for_frozen_empty_or_unused_parameters():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    empty, frozen = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = SparseAdamW([used, unused, empty, frozen], lr=0.1)
    (used.sum() + empty.sum()).backward()
    optimizer.step()
    assert list(optimizer.state) == [used]
    assert (used < 1).all()
    assert torch.equal(unused.detach(), torch.ones(3))


def test_low_precision_values_keep_a_float32_master():
    """Updates far below the precision of bf16 add up."""
    low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    full = nn.Parameter(torch.ones(4))
    optimizers = SparseAdamW([low], lr=1e-4), SparseAdamW([full], lr=1e-4)
    for _ in range(100):
        for parameter, optimizer in zip((low, full), optimizers):
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
    state = optimizers[0].state[low]
    assert state["master"].dtype == torch.float32
    assert torch.equal(state["master"], full.detach())
    assert torch.equal(low.detach(), full.detach().to(torch.bfloat16))
    assert set(optimizers[1].state[full]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_something_else_sets_between_steps_stay_set(dtype, state_bits, transposed):
    low = nn.Parameter(torch.ones(3, 4, dtype=dtype).t() if transposed else torch.ones(4, 3, dtype=dtype))
    optimizer = SparseAdamW([low], lr=0.1, state_bits=state_bits)
    for _ in range(3):
        low.grad = torch.full_like(low, 0.5)
        optimizer.step()
    kept = optimizer.state[low]["master"].clone()
    with torch.no_grad():
        low[1].fill_(7)  # as a loaded state dict
    low.data[2].mul_(-2)  # as averages do, which autograd does not see
    wanted = low.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(low.detach(), wanted)
    master = optimizer.state[low]["master"]
    assert torch.equal(master[1:3], wanted[1:3].float())
    # of the others it has more digits still
    assert torch.equal(master[::3], kept[::3]) and not torch.equal(kept, kept.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_state_continues_bit_for_bit(dtype, tmp_path):
    def run(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step()

    one = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = SparseAdamW([one], lr=0.01, weight_decay=0.1)
    run(one, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = nn.Parameter(one.detach().clone())
    resumed = SparseAdamW([other], lr=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(one, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert torch.equal(one, other)
    for name, tensor in optimizer.state[one].items():
        assert tensor.dtype == resumed.state[other][name].dtype == torch.float32
        assert torch.equal(tensor, resumed.state[other][name])


def test_groups_schedules_and_closures():
    fast, slow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SparseAdamW([{"params": [fast]}, {"params": [slow], "lr": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (fast + slow).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert torch.allclose(fast, torch.full((2,), 0.9))
    assert torch.equal(slow.detach(), torch.ones(2))
    schedule.step()
    optimizer.step(closure)
    assert torch.allclose(fast, torch.full((2,), 0.85))


def test_copies_are_independent():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SparseAdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert state["state"][0]["step"].item() == 1


def test_bad_hyperparameters_are_reported_together():
    with pytest.raises(SpftConfigError) as caught:
        SparseAdamW([nn.Parameter(torch.ones(1))], lr=-1, betas=(0.9, 1.0), eps=0, weight_decay=-0.1, state_bits=4)
    assert len(caught.value.problems) == 5


def test_every_groups_hyperparameters_are_checked():
    optimizer = SparseAdamW([nn.Parameter(torch.ones(1))])
    for bad, message in ({"state_bits": 16}, "`state_bits: 16` must be 8 or 32"), ({"betas": (0.9,)}, "must be two"):
        with pytest.raises(SpftConfigError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **bad})
        with pytest.raises(SpftConfigError, match=message):
            SparseAdamW([{"params": [nn.Parameter(torch.ones(1))], **bad}])
    assert len(optimizer.param_groups) == 1


def optimizer_after_a_step(size: int = 10, dtype: torch.dtype = torch.float32, state_bits: int = 32) -> SparseAdamW:
    parameter = nn.Parameter(torch.ones(size, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = SparseAdamW([parameter], state_bits=state_bits)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize(
    ("saved", "own"),
    [
        ({"size": 10}, {"size": 4000}),
        ({"size": 4000}, {"size": 10}),
        ({"dtype": torch.float32}, {"dtype": torch.bfloat16}),
        ({"dtype": torch.bfloat16}, {"dtype": torch.float32}),
    ],
    ids=["shorter", "longer", "without masters", "with masters"],
)
def test_the_state_of_other_values_is_refused_and_changes_nothing(state_bits, saved, own):
    state = optimizer_after_a_step(**saved, state_bits=state_bits).state_dict()
    optimizer = optimizer_after_a_step(**own, state_bits=state_bits)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SpftFileError, match="the optimizer state to resume from has entries of sizes"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, tensor in before["state"][0].items():
        assert torch.equal(after["state"][0][name], tensor)


def test_the_state_of_another_optimizer_is_refused():
    optimizer = optimizer_after_a_step()
    other = torch.optim.AdamW([nn.Parameter(torch.ones(10))])
    with pytest.raises(SpftFileError, match="saved by another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    optimizer.step()


def test_every_group_is_compared():
    groups = [[nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(4))]]
    optimizer = SparseAdamW([{"params": params} for params in groups])
    state = optimizer.state_dict()
    state["param_groups"][1]["state_bits"] = 8
    with pytest.raises(SpftFileError, match="has 8-bit moments"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_precision_that_float32_would_lose_is_refused(dtype):
    with pytest.raises(SpftConfigError, match="computes in float32"):
        SparseAdamW([nn.Parameter(torch.ones(3, dtype=dtype))])
    optimizer = optimizer_after_a_step()
    with pytest.raises(SpftConfigError, match=f"parameters are {dtype}"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_parameters_that_are_stored_transposed(dtype, state_bits):
    weight = torch.linspace(-1, 1, 12).view(3, 4).to(dtype)
    transposed, plain = nn.Parameter(weight.clone().t()), nn.Parameter(weight.t().contiguous())
    assert not transposed.is_contiguous()
    for parameter in (transposed, plain):
        optimizer = SparseAdamW([parameter], lr=0.1, state_bits=state_bits)
        for step in range(3):
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(torch.sin(9 * weight.t() + step))
            optimizer.step()
    assert (plain - weight.t()).abs().max() > 0.1
    assert torch.equal(transposed, plain)
