"""An optimizer's state follows values that move: whole, in parts, in 8 bits; what cannot follow is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_spft import SparseAdamW
from axolotl_spft.errors import SpftError
from axolotl_spft.optim.rearrange import check_follows, names_of_state, read_part, rearrange_, rearranged, write_part

# three blocks of 256 moments, the last one of 88
COUNT = 600


def trained(state_bits: int = 32) -> tuple[nn.Parameter, SparseAdamW]:
    torch.manual_seed(0)
    values = nn.Parameter(torch.randn(COUNT))
    optimizer = SparseAdamW([values], lr=1e-2, state_bits=state_bits)
    for _ in range(3):
        values.grad = torch.randn(COUNT)
        optimizer.step()
    return values, optimizer


def test_entries_come_from_their_sources_and_new_ones_are_0():
    found = rearranged(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, -1, 0]))
    assert found.tolist() == [3.0, 0.0, 1.0]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_all_that_is_kept_of_each_value_moves_with_it(state_bits):
    values, optimizer = trained(state_bits)
    state, whole = optimizer.state[values], slice(0, COUNT)
    names = names_of_state(state, COUNT, state_bits, "SparseAdamW")
    assert set(names) >= {"exp_avg", "exp_avg_sq"} and "step" not in names
    before = {name: read_part(state, name, whole, state_bits).clone() for name in names}
    sources = torch.randperm(COUNT)
    sources[::7] = -1
    steps = state["step"]
    rearrange_(optimizer, values, sources)
    assert state["step"] == steps
    for name in names:
        now, expected = read_part(state, name, whole, state_bits), rearranged(before[name], sources)
        assert not now[sources < 0].any() and now.any()
        assert (now - expected).abs().max() <= (0.02 * expected.abs().max() if state_bits == 8 else 0)


@pytest.mark.parametrize(
    "part", [slice(0, 256), slice(100, 300), slice(250, 600), slice(590, 600), slice(7, 7)], ids=str
)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_part_that_is_written_is_read_and_the_blocks_beside_it_stay(state_bits, part):
    """The parts of ranks end within blocks of moments in 8 bits."""
    values, optimizer = trained(state_bits)
    state = optimizer.state[values]
    for name in ("exp_avg", "exp_avg_sq"):
        whole = read_part(state, name, slice(0, COUNT), state_bits).clone()
        numbers = 0.5 * whole[part].flip(0)
        write_part(state, name, part, state_bits, numbers)
        tolerance = 0.02 * whole.abs().max() if state_bits == 8 else 0
        got = read_part(state, name, part, state_bits)
        assert got.shape == numbers.shape and (got - numbers).abs().le(tolerance).all()
        now = read_part(state, name, slice(0, COUNT), state_bits)
        first, last = (part.start // 256 * 256, -(-part.stop // 256) * 256) if part.start < part.stop else (0, 0)
        beside = torch.ones(COUNT, dtype=torch.bool)
        beside[first:last] = False
        assert torch.equal(now[beside], whole[beside])
        beside[first:last] = True
        beside[part] = False
        assert (now[beside] - whole[beside]).abs().le(tolerance).all()


def test_what_cannot_follow_is_refused():
    values, optimizer = trained()
    check_follows(optimizer, [values])
    with pytest.raises(SpftError, match="does not hold the values of the adapter whose mask changes"):
        check_follows(optimizer, [nn.Parameter(torch.zeros(3))])
    optimizer.state[values]["exp_avg"] = torch.zeros(COUNT - 1)
    with pytest.raises(SpftError, match=r"SparseAdamW keeps `exp_avg` for the values, .* or one of adamw_torch"):
        check_follows(optimizer, [values])
