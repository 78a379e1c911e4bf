"""Memory that was freed goes back to the system."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from axolotl_spft.salience.release import give_back_memory

_BLOCKS, _NUMBERS = 1024, 2**14


def given_back():
    """Bytes given back of every other one of equal blocks, and whether the others still hold what they held."""
    blocks = [torch.full((_NUMBERS,), float(index)) for index in range(_BLOCKS)]
    kept = blocks[::2]
    del blocks
    resident = psutil.Process().memory_info
    before = resident().rss
    give_back_memory()
    return before - resident().rss, all(bool((block == 2 * index).all()) for index, block in enumerate(kept))


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked")
def test_freed_blocks_between_blocks_in_use_are_given_back():
    # a process of its own: how memory lies in this one depends on the tests before
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        size, intact = process.submit(given_back).result()
    assert size > 0.8 * (_BLOCKS // 2) * 4 * _NUMBERS
    assert intact
