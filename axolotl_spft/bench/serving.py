"""What an adapter costs after training: its file, and going from one adapter to another."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from axolotl_spft.bench.memory import synchronize
from axolotl_spft.bench.methods import FIRST, SECOND, Method

_REPEATS = 15


def file_bytes(method: Method) -> int:
    """The length of the tensors' file that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        method.model.save_pretrained(folder, save_embedding_layers=False)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def switch_seconds(method: Method, device: torch.device) -> dict[str, float]:
    """Medians with two adapters loaded.

    ``forward``: one token with the adapter in use. ``switch``: choosing the other adapter, and the same forward.
    ``merge`` and ``unmerge``: of the adapter in use.
    """
    model = method.model
    method.add_second()
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=token)

    def switch(name: str) -> None:
        model.set_adapter(name)
        forward()

    def timed(action: Callable[[], None]) -> float:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        return time.perf_counter() - start

    # each adapter's first use works out what the later ones find
    for name in (SECOND, FIRST):
        switch(name)
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "switch", "merge", "unmerge")}
    for repeat in range(_REPEATS):
        seconds["switch"].append(timed(lambda name=(SECOND, FIRST)[repeat % 2]: switch(name)))
        seconds["forward"].append(timed(forward))
        seconds["merge"].append(timed(model.merge_adapter))
        seconds["unmerge"].append(timed(model.unmerge_adapter))
    return {name: statistics.median(each) for name, each in seconds.items()}
