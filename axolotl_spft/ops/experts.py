"""A weight of several experts as a tensor of the graph, whose gradient arrives at the entries of a sparse delta alone.

A module of experts multiplies by its parameter of three dimensions in its own way: expert by expert, or all of them in
one grouped product. It is given W + S in the place of W, and autograd's dense gradient of that is read at the entries
of the mask and dropped: one expert's at a time where the module takes the experts one by one, else the parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.ops.weight.stacked import by_expert, entries_of

# given the dense gradient of some experts, (experts, out_features, in_features) of any strides, and the first one's
# index
Watcher = Callable[[Tensor, int], None]


class ExpertMask:
    """A mask of (experts x out_features, in_features), and where each expert's values begin.

    Attributes:
        mask: of all experts.
    """

    def __init__(self, mask: Mask, experts: int):
        self.mask = mask
        self._rows = mask.out_features // experts
        self._starts: list[int] = mask.row_offsets[:: self._rows].tolist()

    def values_of(self, expert: int) -> slice:
        """Which values are those of one expert."""
        return slice(self._starts[expert], self._starts[expert + 1])

    def of(self, expert: int) -> Mask:
        """The mask of one expert: (out_features, in_features)."""
        values = self.values_of(expert)
        first = expert * self._rows
        offsets = self.mask.row_offsets[first : first + self._rows + 1]
        return Mask(self.mask.columns[values], offsets - values.start)


class ExpertUse:
    """One forward pass with a weight of experts, and the backward pass that follows it.

    Args:
        weight: W + S as stored, (experts, out_features, in_features), or each expert's transposed; only read.
        transposed: whether it is.
        values: (nnz) of S, if there is one.
        where: of the values.
        watchers: who else is given the gradient.
        check: called whenever a gradient has been computed by ``weight``; raises where that was not W + S.
    """

    def __init__(
        self,
        weight: Tensor,
        transposed: bool,
        values: Tensor | None,
        where: ExpertMask | None,
        watchers: Sequence[Watcher] = (),
        check: Callable[[], None] = lambda: None,
    ):
        self.weight, self.transposed, self.watchers, self.check = weight, transposed, watchers, check
        self._where = where
        self._values = None if values is None or not values.requires_grad else values.detach()
        self._gradient: Tensor | None = None

    def add(self, gradient: Tensor, expert: int | None) -> None:
        """Add the gradient of one expert's weight, or of all, each in the layout of storage."""
        self.check()
        experts = by_expert(gradient if expert is None else gradient[None], self.transposed)
        if self._values is not None:
            if self._gradient is None:
                self._gradient = torch.zeros_like(self._values)
            if expert is None:
                self._gradient += entries_of(self._where.mask, experts)
            else:
                self._gradient[self._where.values_of(expert)] += entries_of(self._where.of(expert), experts)
        for watcher in self.watchers:
            watcher(experts, expert or 0)

    def take_gradient(self) -> Tensor | None:
        """The gradient of the values, (nnz), of all that was added since it was asked for last."""
        gradient, self._gradient = self._gradient, None
        return gradient


class _Values(torch.autograd.Function):
    """Takes the values into the graph as a number that every part of the weight depends on.

    Its backward pass comes after those of all the parts.
    """

    @staticmethod
    def forward(ctx, values: Tensor, use: ExpertUse) -> Tensor:
        ctx.use = use
        # for torch's check that nobody has changed them before backward
        ctx.save_for_backward(values)
        return torch.zeros((), device=values.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _: Tensor):
        _ = ctx.saved_tensors
        return ctx.use.take_gradient(), None


class _Part(torch.autograd.Function):
    """The weight of one expert, or of all."""

    @staticmethod
    def forward(ctx, token: Tensor, use: ExpertUse, expert: int | None) -> Tensor:
        ctx.use, ctx.expert = use, expert
        return use.weight.detach() if expert is None else use.weight.detach()[expert].detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        ctx.use.add(gradient, ctx.expert)
        return torch.zeros((), device=gradient.device), None, None


def weight_in_graph(values: Tensor | None, use: ExpertUse, one_by_one: bool) -> Tensor | OneByOne:
    """What a module of experts is given in the place of its parameter.

    Args:
        values: (nnz), which receive the gradient; where they need none, or there are none, the watchers alone do.
        one_by_one: whether the module asks for one expert after the other, and nothing but torch's own functions reads
            the weight.
    """
    seed = values
    if values is None or not values.requires_grad:
        seed = torch.zeros((), device=use.weight.device, requires_grad=True)
    token = _Values.apply(seed, use)
    return OneByOne(token, use) if one_by_one else _Part.apply(token, use, None)


class OneByOne:
    """Stands for the weight of all experts: indexed by one number it gives that expert's, with a gradient of its own.

    torch would make a gradient of the size of all experts for each. In any other function the whole weight takes part.
    """

    def __init__(self, token: Tensor, use: ExpertUse):
        self._token, self._use, self._whole = token, use, None

    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = _Part.apply(self._token, self._use, None)
        return self._whole

    def __len__(self) -> int:
        return len(self._use.weight)

    def __getitem__(self, index: Any) -> Tensor:
        if not _is_number(index):
            return self.whole()[index]
        expert = int(index)
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        return _Part.apply(self._token, self._use, expert % len(self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return function(*args, **kwargs)


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and index.dtype not in (torch.bool, torch.uint8)
    return isinstance(index, int) and not isinstance(index, bool)
