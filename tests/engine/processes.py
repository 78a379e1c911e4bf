"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Every rank's ``function(*args)``, in the order of ranks; the function must be one of a module."""
    # gloo's ranks compute on the CPU
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        multiprocessing.spawn(_run, (world, folder, function, args), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _run(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(*args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
