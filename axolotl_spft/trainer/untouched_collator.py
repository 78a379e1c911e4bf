"""A context that leaves no trace in a data collator, which may have a random generator or a count of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched_collator(collator: Any) -> Iterator[None]:
    """Put back what a collator holds, and how far its generators have come; of the collators in it, too.

    Models and other things that it holds are left alone, and nothing is copied: a collator may hold a whole model.
    """
    restorers = [restore for holder in _holders(collator) for restore in _restorers(holder)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _holders(collator: Any) -> list[Any]:
    """The objects with attributes that collate: the collator, what it is a method or a part of, those that it holds."""
    waiting: list[Any] = [collator]
    found: dict[int, Any] = {}
    while waiting:
        each = waiting.pop()
        if isinstance(each, partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            # a method can be one of a trainer, whose state is put back by others
            found.setdefault(id(each.__self__), each.__self__)
        elif id(each) not in found and _collates(each):
            found[id(each)] = each
            waiting += vars(each).values()
    return list(found.values())


def _collates(value: Any) -> bool:
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, FunctionType))


def _restorers(holder: Any) -> Iterator[Callable[[], None]]:
    attributes = dict(vars(holder))
    if callable(holder):
        yield partial(_put_back, holder, attributes)
    for value in attributes.values():
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())


def _put_back(holder: Any, attributes: dict[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(attributes)
