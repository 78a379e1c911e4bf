"""The peak memory of one method."""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Measures one method's memory, made before anything of the method is.

    On a GPU: what the method holds plus the most that it allocates on top, whatever else the process holds. On the CPU:
    the peak resident size of the process, where the method has a process of its own and the system tells.
    """

    def __init__(self, device: torch.device, own_process: bool):
        self.device, self._own_process = device, own_process
        self._start_bytes = self._allocated_bytes()
        self._resident_bytes: int | None = None
        self._reset_bytes = self._start_bytes

    def _allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def settle(self) -> None:
        """Say that the method is complete: other methods may be made from here on."""
        gc.collect()
        self._resident_bytes = self._allocated_bytes() - self._start_bytes

    def reset(self) -> None:
        """Begin a peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._reset_bytes = self._allocated_bytes()
        elif self._own_process:
            _reset_peak_resident()

    def peak_bytes(self) -> int | None:
        """The peak since `reset`; None where it cannot be known."""
        if self.device.type == "cuda":
            resident = self._resident_bytes
            if resident is None:
                resident = self._reset_bytes - self._start_bytes
            return resident + torch.cuda.max_memory_allocated(self.device) - self._reset_bytes
        return _peak_resident_bytes() if self._own_process else None


def _reset_peak_resident() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes the present size


def _peak_resident_bytes() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
