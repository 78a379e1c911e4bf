"""An optimizer's state follows values that go to other places, or begin anew, when the mask under them changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from axolotl_spft.optim.moments import BLOCK, MOMENTS, absmax_name, padding, read_moment, write_moment

# of optimizers whose state is one number for each value that begins with 0, and of the masters of low precision
_PER_VALUE = (*MOMENTS, "max_exp_avg_sq", "momentum_buffer", "master")
# Hugging Face's names of optimizers of which this is so
SUITABLE = ("adamw_torch", "adamw_torch_fused", "sgd")


def rearranged(tensor: Tensor, sources: Tensor) -> Tensor:
    """The entries of ``tensor`` (n) in a new order, with 0 for new ones.

    Args:
        sources: (n) int64: where each entry of the result comes from; -1 for one that begins anew.
    """
    found = tensor[sources.clamp_min(0)]
    found[sources < 0] = 0
    return found


def check_follows(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Check that `rearrange_` can be called for each of the parameters.

    Raises:
        SpftError: the optimizer does not hold one, or keeps something of which no part belongs to a value.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in parameters:
        if parameter not in groups:
            raise SpftError(
                "the optimizer does not hold the values of the adapter whose mask changes: make it from the model's "
                "parameters, after the mask is selected"
            )
        bits = groups[parameter].get("state_bits", 32)
        names_of_state(optimizer.state.get(parameter, {}), parameter.numel(), bits, type(optimizer).__name__)


def rearrange_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, sources: Tensor) -> None:
    """`rearranged` all that an optimizer keeps for the values of a parameter; its count of steps stays.

    Moments in 8 bits are rounded anew, since other values share a block of 256 with them.
    """
    group = next(group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
    state, bits = optimizer.state.get(parameter, {}), group.get("state_bits", 32)
    whole = slice(0, parameter.numel())
    for name in names_of_state(state, parameter.numel(), bits, type(optimizer).__name__):
        kept = read_part(state, name, whole, bits)
        write_part(state, name, whole, bits, rearranged(kept, sources.to(kept.device)))


def names_of_state(state: Mapping[str, Any], count: int, bits: int, optimizer: str) -> list[str]:
    """The entries of a parameter's state that hold one number for each of its ``count`` values.

    Raises:
        SpftError: there are others of which no part belongs to a value.
    """
    names = []
    for name, entry in state.items():
        if name == "step" or not isinstance(entry, Tensor):
            continue
        if bits == 8 and name in map(absmax_name, MOMENTS):
            continue
        fits = name in _PER_VALUE and entry.numel() == count
        if not fits or not (entry.is_floating_point() or (bits == 8 and name in MOMENTS)):
            raise SpftError(
                f"{optimizer} keeps `{name}` for the values, which does not follow them when the mask changes: use "
                f"SparseAdamW (`sparse_adamw`, `sparse_adamw_8bit`) or one of {', '.join(SUITABLE)}, or leave "
                "`reselect` out"
            )
        names.append(name)
    return names


def read_part(state: Mapping[str, Tensor], name: str, part: slice, bits: int) -> Tensor:
    """Some of the numbers that a state holds, flat: (part.stop - part.start), moments in float32."""
    if bits != 8 or name not in MOMENTS:
        return state[name].view(-1)[part]
    blocks, offset = _blocks(part, state[name].numel())
    return _read_blocks(state, name, blocks)[offset : offset + part.stop - part.start]


def write_part(state: Mapping[str, Tensor], name: str, part: slice, bits: int, numbers: Tensor) -> None:
    """The counterpart of `read_part`; of a moment in 8 bits the blocks that it touches are rounded anew."""
    if part.stop <= part.start:
        return
    if bits != 8 or name not in MOMENTS:
        state[name].view(-1)[part] = numbers
        return
    blocks, offset = _blocks(part, state[name].numel())
    moment = _read_blocks(state, name, blocks)
    moment[offset : offset + part.stop - part.start] = numbers
    quantized = state[name][_of_values(blocks, state[name])]
    write_moment(name, quantized, state[absmax_name(name)][blocks], moment)
    # which bitsandbytes rounds to the smallest number above
    quantized[moment == 0] = padding(name, quantized.device)[0]


def _blocks(part: slice, count: int) -> tuple[slice, int]:
    """The blocks of 256 that a part lies in, and where in the first of them it begins."""
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    return blocks, part.start - blocks.start * BLOCK


def _of_values(blocks: slice, quantized: Tensor) -> slice:
    return slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, quantized.numel()))


def _read_blocks(state: Mapping[str, Tensor], name: str, blocks: slice) -> Tensor:
    if blocks.stop <= blocks.start:
        return torch.empty(0, device=state[name].device)
    return read_moment(name, state[name][_of_values(blocks, state[name])], state[absmax_name(name)][blocks])
