"""Where and with what a benchmark ran."""

from __future__ import annotations

import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from axolotl_spft import __version__

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def machine() -> dict[str, Any]:
    """Date, processor, GPU, threads and versions."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        cpu = found.group(1).strip()
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "cuda": torch.version.cuda,
        "versions": {
            "python": platform.python_version(),
            "axolotl_spft": __version__,
            **{name: version(name) for name in _PACKAGES},
        },
    }
