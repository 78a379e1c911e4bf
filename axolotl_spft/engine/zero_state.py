"""What DeepSpeed keeps in parts on the ranks for a parameter: its float32 master and its optimizer's state.

It keeps them under names that are not public: those that are read here are the same in DeepSpeed 0.18 and 0.19.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import is_partitioned
from axolotl_spft.errors import SpftError
from axolotl_spft.optim.rearrange import names_of_state, read_part, rearranged, write_part


class _Piece(NamedTuple):
    """The part of a parameter that this rank looks after: ``of_values`` of it is ``of_master`` of a flat master."""

    master: Tensor
    group: dict[str, Any]
    of_values: slice
    of_master: slice


def is_zero_optimizer(optimizer: Any) -> bool:
    """Whether this is the optimizer of DeepSpeed's ZeRO around another one."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


@torch.no_grad()
def rearrange_zero_(optimizer: Any, parameter: nn.Parameter, sources: Tensor, ranks: Ranks) -> None:
    """As `axolotl_spft.optim.rearrange.rearrange_`, of an optimizer of ZeRO; all ranks must call it together.

    Each tensor is put together from all ranks' parts, one after the other, and every rank takes its part of the result.

    Raises:
        SpftError: see there; or the parts do not make up the parameter; or this DeepSpeed keeps them elsewhere.
    """
    inner = optimizer.optimizer
    try:
        piece = _piece_of(optimizer, parameter, ranks.rank)
    except (AttributeError, KeyError, StopIteration) as error:
        raise SpftError(
            f"DeepSpeed {version('deepspeed')} does not keep the values' optimizer state where DeepSpeed 0.18 and 0.19 "
            "do, so the mask cannot change: install one of these, train under DDP, or leave `reselect` out"
        ) from error
    master, bits = piece.master.detach().view(-1), piece.group.get("state_bits", 32)
    state = inner.state.get(piece.master, {})
    for name in names_of_state(state, master.numel(), bits, type(inner).__name__):
        own = read_part(state, name, piece.of_master, bits)
        write_part(state, name, piece.of_master, bits, _rearranged_part(own, sources, piece, ranks))
    master[piece.of_master] = _rearranged_part(master[piece.of_master], sources, piece, ranks)


def _rearranged_part(own: Tensor, sources: Tensor, piece: _Piece, ranks: Ranks) -> Tensor:
    whole = ranks.concatenate(own)
    if whole.numel() != sources.numel():
        raise SpftError(
            f"DeepSpeed's ranks hold {whole.numel()} numbers for a parameter of {sources.numel()} values: `reselect` "
            "knows ZeRO-1, 2 and 3 of one data-parallel group only"
        )
    return rearranged(whole, sources.to(whole.device))[piece.of_values]


def _piece_of(optimizer: Any, parameter: nn.Parameter, rank: int) -> _Piece:
    if is_partitioned(parameter):
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise SpftError('"zero_hpz_partition_size" keeps second parts of each parameter: leave it out')
        number, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        # the last ranks' parts are padded to the length of the others
        first = min(rank * length, parameter.ds_numel)
        count = min(length, parameter.ds_numel - first)
        master = optimizer.fp32_partitioned_groups_flat[number]
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]
        return _Piece(master, group, slice(first, first + count), slice(start, start + count))
    number = next(n for n, each in enumerate(optimizer.bit16_groups) if any(p is parameter for p in each))
    master, group = optimizer.single_partition_of_fp32_groups[number], optimizer.optimizer.param_groups[number]
    mapping = parameter._hp_mapping
    if mapping is None:
        return _Piece(master, group, slice(0, 0), slice(0, 0))
    of_values, of_master = (
        slice(address.start, address.start + address.numel)
        for address in (mapping.lp_fragment_address, mapping.hp_fragment_address)
    )
    return _Piece(master, group, of_values, of_master)
