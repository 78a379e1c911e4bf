"""Threads of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable

# how long a thread may take for what it should not do at all
SOON = 0.2


def in_threads(*functions: Callable[[], object]) -> None:
    """Run the functions side by side, each in a thread of its own, until all are over.

    Raises:
        BaseException: what one of them has raised.
    """
    raised: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if raised:
        raise raised[0]
