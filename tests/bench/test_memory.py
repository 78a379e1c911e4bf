"""Peaks of one method, on a CPU and on a GPU whose counters are set by the test."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.bench.memory import PeakMemory

CPU = torch.device("cpu")


def test_on_a_cpu_only_an_own_process_tells_its_peak():
    assert PeakMemory(CPU, own_process=False).peak_bytes() is None
    memory = PeakMemory(CPU, own_process=True)
    memory.reset()
    low = memory.peak_bytes()
    if low is None:
        pytest.skip("the system does not tell")
    block = torch.ones(2**24)
    assert memory.peak_bytes() >= low + block.nbytes // 2


def test_on_a_gpu_other_methods_do_not_count(monkeypatch):
    now, peak = 0, 0
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    now = 1000  # of the methods before
    memory = PeakMemory(torch.device("cuda"), own_process=False)
    now = 1300  # its base
    memory.reset()
    peak = 1700  # its salience pass
    assert memory.peak_bytes() == 700
    now = 1350  # with its adapter
    memory.settle()
    now = 5000  # of the methods after
    memory.reset()
    peak = 5200
    assert memory.peak_bytes() == 350 + 200
