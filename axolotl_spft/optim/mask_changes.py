"""What optimizers have to know of masks that change under the parameters that they hold.

A parameter of values keeps being itself where it can when its mask changes, so that an optimizer trains on; but moments
from before the change belong to other positions. Where it cannot, another parameter takes its place, and an optimizer
that holds the replaced one would train nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from axolotl_spft.errors import SpftError

Slot = tuple[int, str]


class MaskChange(NamedTuple):
    """The last change of the mask under a parameter: its number among all, and (nnz, checksum) of the mask of now."""

    number: int
    slot: Callable[[], Slot | None]


_changes, _replaced = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
_count = 0
_watching = False


def changes_made() -> int:
    """How many changes of masks have been noted so far: the number of the last one."""
    return _count


def change_of(parameter: nn.Parameter) -> MaskChange | None:
    """The last change of the mask under a parameter, if there was one."""
    return _changes.get(parameter)


def note_change(parameter: nn.Parameter, slot: Callable[[], Slot | None]) -> None:
    """Say that a parameter's values stand for other positions from now on.

    Args:
        slot: gives (nnz, checksum) of the mask at the time of the call, None when that is gone.
    """
    global _count
    _count += 1
    _changes[parameter] = MaskChange(_count, slot)


def note_replacement(parameter: nn.Parameter, adapter_name: str) -> None:
    """Say that another parameter has taken this one's place: from now on a step of any optimizer that holds it raises.

    Nothing tells which optimizers hold a parameter, so every step asks, once there is a replaced one.
    """
    global _watching
    _replaced[parameter] = adapter_name
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_replaced)
        _watching = True


def _refuse_replaced(optimizer: Optimizer, *_: object) -> None:
    if not len(_replaced):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _replaced:
                raise SpftError(
                    f"the optimizer holds values of adapter `{_replaced[parameter]}` that no longer belong to the "
                    "model: a mask with other numbers of values in its layers was loaded since, or the adapter was "
                    "deleted and made again. Make the optimizer after the mask is loaded"
                )
