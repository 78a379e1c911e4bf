"""Work on a second stream of a GPU, beside what the current stream does meanwhile.

The values' gradient seldom keeps a GPU busy alone: its product is small, and its copies wait for memory.
"""

from __future__ import annotations

import functools
from types import TracebackType

import torch


class Beside:
    """What runs inside ``with`` runs beside what is started outside until `join`.

    The second stream begins where the current one stands, and the current one goes on where the second one ends. So
    tensors of either may be read in the other between here and `join`, and dropped after it.
    """

    def __init__(self, device: torch.device):
        self._current, self._second = torch.cuda.current_stream(device), _second_stream(device)
        self._second.wait_stream(self._current)
        self._inside = torch.cuda.stream(self._second)

    def __enter__(self) -> None:
        self._inside.__enter__()

    def __exit__(self, *raised: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._inside.__exit__(*raised)

    def join(self) -> None:
        """Let the current stream wait for all that ran inside."""
        self._current.wait_stream(self._second)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # first in line: its few blocks fill what large products leave idle
    return torch.cuda.Stream(device, priority=-1)
