"""Something to do when the backward pass that runs is over, whether it succeeds or not."""

from __future__ import annotations

from collections.abc import Callable

import torch


class _EndOfBackward:
    """Ends a backward pass: called by autograd after its last node, or dropped by it after an error."""

    def __init__(self, end: Callable[[], None]):
        self._end: Callable[[], None] | None = end

    def __call__(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()

    __del__ = __call__


def at_end_of_backward(end: Callable[[], None]) -> None:
    """Let ``end`` be called once when the backward pass of this thread is over; there must be one."""
    torch.autograd.Variable._execution_engine.queue_callback(_EndOfBackward(end))
