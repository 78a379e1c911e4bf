"""A trainer that is as before where something that changes it does not come to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def put_back_on_failure(trainer: Any) -> Iterator[None]:
    """Put the trainer's attributes and callbacks back where the block raises, or is interrupted.

    What they refer to is theirs: the block replaces it, and does not change it.
    """
    attributes, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    try:
        yield
    except BaseException:
        trainer.callback_handler.callbacks[:] = callbacks
        for name in vars(trainer).keys() - attributes.keys():
            delattr(trainer, name)
        vars(trainer).update(attributes)
        raise
