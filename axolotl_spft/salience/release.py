"""Hands memory that the salience pass has freed back to the system, so that training starts without it."""

from __future__ import annotations

import ctypes
import sys

from accelerate.utils.memory import clear_device_cache


def give_back_memory() -> None:
    """Let go of what Python, the device's allocator and the C library hold of freed memory.

    The accumulators are as large as the weights in float32. glibc keeps what lies between blocks in use, and a process
    would stay as large as it was in the pass.
    """
    clear_device_cache(garbage_collection=True)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)
