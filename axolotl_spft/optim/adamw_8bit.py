"""`adamw_` on moments in blockwise 8 bits: many tensors in few passes, with little in float32 at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.optim.adamw import adamw_
from axolotl_spft.optim.moments import BLOCK, MOMENTS, absmax_name, padding, read_moment, write_moment

# values whose moments are float32 at a time: bounds the temporaries to 32 MiB
CHUNK_VALUES = 2**14 * BLOCK


class _Piece(NamedTuple):
    """Some blocks of one tensor."""

    values: Tensor
    grad: Tensor
    state: dict[str, Tensor]


def adamw_8bit_(
    values: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of `axolotl_spft.optim.adamw.adamw_` for every tensor of the lists.

    Args:
        values, grads: float32; the values are changed in place.
        states: of each, from `axolotl_spft.optim.moments.zero_moments`, and ``step``; changed in place.
    """
    tensors = [_Piece(value.view(-1), grad.reshape(-1), state) for value, grad, state in zip(values, grads, states)]
    for pieces in _chunks(tensors):
        _update(pieces, lr, betas, eps, weight_decay)
    torch._foreach_add_([state["step"] for state in states], 1)


def _chunks(tensors: list[_Piece]) -> Iterator[list[_Piece]]:
    """All tensors, cut and put together into chunks of at most `CHUNK_VALUES` values, in whole blocks."""
    chunk, free = [], CHUNK_VALUES
    for tensor in tensors:
        start = 0
        while start < tensor.values.numel():
            stop = min(tensor.values.numel(), start + free)
            chunk.append(_part(tensor, start, stop))
            free -= _whole_blocks(stop - start)
            start = stop
            if not free:
                yield chunk
                chunk, free = [], CHUNK_VALUES
    if chunk:
        yield chunk


def _part(tensor: _Piece, start: int, stop: int) -> _Piece:
    values, blocks = slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
    state = {"step": tensor.state["step"]} | {name: tensor.state[name][values] for name in MOMENTS}
    state |= {absmax_name(name): tensor.state[absmax_name(name)][blocks] for name in MOMENTS}
    return _Piece(tensor.values[values], tensor.grad[values], state)


def _update(pieces: list[_Piece], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    sizes = [piece.values.numel() for piece in pieces]
    starts = [0, *accumulate(map(_whole_blocks, sizes))]
    joined = {name: _joined(name, [piece.state[name] for piece in pieces]) for name in MOMENTS}
    scales = {name: torch.cat([piece.state[absmax_name(name)] for piece in pieces]) for name in MOMENTS}
    moments = {name: read_moment(name, joined[name], scales[name]) for name in MOMENTS}
    parts = [[moment[start : start + size] for start, size in zip(starts, sizes)] for moment in moments.values()]
    # copies: a tensor of several pieces would count on with each
    steps = torch._foreach_add([piece.state["step"] for piece in pieces], 0)
    values, grads = [piece.values for piece in pieces], [piece.grad for piece in pieces]
    adamw_(values, grads, *parts, list(steps), lr, betas, eps, weight_decay)
    for name in MOMENTS:
        write_moment(name, joined[name], scales[name], moments[name])
        stored = [joined[name][start : start + size] for start, size in zip(starts, sizes)]
        torch._foreach_copy_([piece.state[name] for piece in pieces], stored)
        scale_parts = scales[name].split([-(-size // BLOCK) for size in sizes])
        torch._foreach_copy_([piece.state[absmax_name(name)] for piece in pieces], list(scale_parts))


def _joined(moment: str, quantized: list[Tensor]) -> Tensor:
    """The tensors one after the other, each filled up with zeros to whole blocks."""
    zeros = padding(moment, quantized[0].device)
    parts = []
    for tensor in quantized:
        parts += [tensor, zeros[: _whole_blocks(tensor.numel()) - tensor.numel()]]
    return torch.cat(parts)


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
