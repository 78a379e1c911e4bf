"""The processes of a distributed run, and the collective operations that the salience pass needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from axolotl_spft.errors import SpftError


class Ranks(NamedTuple):
    """This process among ``world``; every operation does nothing where there is one process.

    All operations must be called on every rank, in the same order.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the default process group, or one process where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rows(self, out_features: int, rank: int | None = None) -> slice:
        """The rows of a matrix that a rank (this one by default) looks after: contiguous, in the order of ranks."""
        rank = self.rank if rank is None else rank
        return slice(out_features * rank // self.world, out_features * (rank + 1) // self.world)

    def own_positions(self, at: Tensor, shape: tuple[int, int]) -> Tensor:
        """Those of ``at``, row * in_features + column, that lie in this rank's rows, counted from the first of these.

        Args:
            shape: (out_features, in_features) of the matrix.
        """
        rows, in_features = self.rows(shape[0]), shape[1]
        return at[(at >= rows.start * in_features) & (at < rows.stop * in_features)] - rows.start * in_features

    def sum_(self, tensor: Tensor) -> Tensor:
        """Make ``tensor`` the sum over all ranks, in place."""
        if self.world > 1:
            moved = tensor.to(_device())
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def sum_numbers(self, *numbers: int) -> tuple[int, ...]:
        """The sum of each number over all ranks."""
        return tuple(self.sum_(torch.tensor(numbers, dtype=torch.int64)).tolist()) if self.world > 1 else numbers

    def sum_to_(self, tensor: Tensor, rank: int) -> Tensor:
        """Make ``tensor`` the sum over all ranks on ``rank``; on the others it is lost."""
        if self.world > 1:
            moved = tensor.to(_device())
            dist.reduce(moved, dst=rank)
            if moved is not tensor and rank == self.rank:
                tensor.copy_(moved)
        return tensor

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Every rank's ``numbers`` (n; int64): (world, n)."""
        if self.world == 1:
            return numbers[None]
        mine = numbers.to(_device())
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).to(numbers.device)

    def concatenate(self, part: Tensor) -> Tensor:
        """The ranks' 1-dimensional parts, which may differ in length, one after the other."""
        if self.world == 1:
            return part
        lengths = self.gather_numbers(torch.tensor([part.numel()]))[:, 0].tolist()
        padded = torch.zeros(max(lengths), dtype=part.dtype, device=_device())
        padded[: part.numel()] = part
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([each[:length] for each, length in zip(parts, lengths)]).to(part.device)

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What ``work()`` gives on rank 0, where alone it runs, on every rank; it must not raise."""
        found = [work() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0, device=_device())
        return found[0]


def on_every_rank(work: Callable[[], Any], ranks: Ranks) -> Any:
    """``work()``; an error on one rank is raised on all, where the others would wait for it at their next exchange."""
    result, failure = None, None
    try:
        result = work()
    except (SpftError, OSError) as error:
        failure = error
    failed = ranks.sum_numbers(int(failure is not None))[0]
    if failure is not None:
        raise failure
    if failed:
        raise SpftError(f"{failed} of {ranks.world} ranks failed: their messages say why")
    return result


def _device() -> torch.device:
    """Where the process group's tensors must be."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
