"""Which layers hold their W in which memory: what several hold, of one model or of several, none of them may write."""

from __future__ import annotations

import threading
from typing import Protocol
from weakref import WeakSet

from torch import Tensor


class Holder(Protocol):
    """What is needed of a layer."""

    @property
    def stored_weight(self) -> Tensor:
        """The weight as it is stored."""

    def stop_writing(self) -> None:
        """Put W back, and write W + S into the weight no more."""


# by address; layers whose weight lies elsewhere by now are passed over
_holders: dict[int, WeakSet[Holder]] = {}
_LOCK = threading.RLock()


def holds_alone(layer: Holder) -> bool:
    """Whether no other layer holds the memory of this one's weight: otherwise all of them stop writing into it."""
    address = layer.stored_weight.data_ptr()
    with _LOCK:
        holders = _holders.setdefault(address, WeakSet())
        others = [each for each in holders if each is not layer and each.stored_weight.data_ptr() == address]
        holders.add(layer)
    for each in others:
        each.stop_writing()
    return not others


def release(layer: Holder) -> None:
    """Forget a layer that is taken out of its model, whose weight lives on in another one."""
    with _LOCK:
        holders = _holders.get(layer.stored_weight.data_ptr())
        if holders is not None:
            holders.discard(layer)


def is_in_shared_memory(weight: Tensor) -> bool:
    """Whether other processes may hold the memory of a weight, as `torch.nn.Module.share_memory` makes it."""
    # memory on a GPU always counts as shared
    return weight.device.type == "cpu" and weight.is_shared()
