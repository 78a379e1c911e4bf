"""What optimizers have to know of masks that change under the parameters that they hold.

A parameter of values keeps being itself where it can when its mask changes, so that an optimizer trains on; but moments
from before the change belong to other positions. Where it cannot, another parameter takes its place, and an optimizer
that holds the replaced one would train nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from axolotl_spft.errors import SpftError

Slot = tuple[int, str]


class MaskChange(NamedTuple):
    """The last change of the mask under a parameter: its number among all, and (nnz, checksum) of the mask of now."""

    number: int
    slot: Callable[[], Slot | None]


# (id, version) of each tensor of a parameter's state
_Fingerprint = tuple[tuple[int, int], ...]


class _AfterStep(NamedTuple):
    """How many changes there had been when an optimizer's last step was done, and what its state was then."""

    count: int
    states: WeakTensorKeyDictionary


_changes, _replaced = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
_after_step: weakref.WeakKeyDictionary[Optimizer, _AfterStep] = weakref.WeakKeyDictionary()
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
    _watch()


def note_replacement(parameter: nn.Parameter, adapter_name: str) -> None:
    """Say that another parameter has taken this one's place: from now on a step of any optimizer that holds it raises.

    Nothing tells which optimizers hold a parameter, so every step asks, once there is a replaced one.
    """
    _replaced[parameter] = adapter_name
    _watch()


def _watch() -> None:
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_replaced)
        register_optimizer_step_pre_hook(_refuse_moments_of_before)
        register_optimizer_step_post_hook(_remember_states)
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


def _refuse_moments_of_before(optimizer: Optimizer, *_: object) -> None:
    """Raise where a step would move values by moments of other positions: nothing was done about them since."""
    last = _after_step.get(optimizer)
    if last is None or last.count == _count:
        return
    for parameter, fingerprint in last.states.items():
        change = change_of(parameter)
        if change and change.number > last.count and fingerprint == _fingerprint(optimizer, parameter):
            raise SpftError(
                f"{type(optimizer).__name__}'s moments belong to positions of before another mask was installed: make "
                "a new optimizer after the mask, or load the optimizer state that was saved with it"
            )


def _remember_states(optimizer: Optimizer, *_: object) -> None:
    if getattr(optimizer, "knows_masks", False):
        return
    held = (parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in _changes)
    found = ((parameter, _fingerprint(optimizer, parameter)) for parameter in held)
    states = WeakTensorKeyDictionary({parameter: fingerprint for parameter, fingerprint in found if fingerprint})
    _after_step[optimizer] = _AfterStep(_count, states)


def _fingerprint(optimizer: Optimizer, parameter: nn.Parameter) -> _Fingerprint:
    """Of a state that holds numbers for each value; it changes with every step, and when the state is loaded."""
    tensors = [x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)]
    return tuple((id(x), x._version) for x in tensors if x.numel() == parameter.numel() and not x.is_inference())
