"""What a benchmark measures: the time of a step, and the bytes kept between forward and backward."""

from __future__ import annotations

import os
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch

from integration.bench.methods import Method


def train_step(method: Method, batch: dict[str, torch.Tensor]) -> None:
    """Forward, backward, and the optimizer's step."""
    method.model(**batch).loss.backward()
    if method.optimizer is not None:
        method.optimizer.step()
        method.optimizer.zero_grad()


def step_seconds(method: Method, batch: dict[str, torch.Tensor]) -> float:
    """Wall-clock seconds of one `train_step`."""
    start = time.perf_counter()
    train_step(method, batch)
    return time.perf_counter() - start


def bytes_kept_for_backward(method: Method, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps after the forward pass, each once, without parameters and buffers."""
    owned = [*method.model.parameters(), *method.model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            return tensor  # SHiRA's delta: its values and indices are the adapter's own
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method.model(**batch).loss
    total = sum(kept.values())
    loss.backward()
    if method.optimizer is not None:
        method.optimizer.zero_grad()
    return total


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    model_name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model_name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": model_name,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "axolotl-spft")},
    }
