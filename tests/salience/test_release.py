"""Memory that was freed goes back to the system."""

import re
import sys
from pathlib import Path

import pytest
import torch

from axolotl_spft.salience.release import give_back_memory

_SIZE = 2**16


def resident_bytes():
    return int(re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE).group(1)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the resident size")
def test_freed_blocks_between_blocks_in_use_are_given_back():
    freed, kept = [], []
    for index in range(1024):
        freed.append(torch.full((_SIZE // 4,), float(index)))
        kept.append(torch.full((64,), float(index)))
    freed.clear()
    before = resident_bytes()
    give_back_memory()
    assert before - resident_bytes() > 512 * _SIZE
    assert all(bool((block == index).all()) for index, block in enumerate(kept))
