"""Starts one training on CPU ranks, to its end or to a crash."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from integration.launch import crash
from integration.launch.cpu_ranks import command, environment


class TrainingFailed(RuntimeError):
    """A training ended otherwise than it should; the message holds the end of its log."""


def train(config: Path, ranks: int, dies_at: str | None = None, timeout_seconds: float = 600) -> str:
    """Train ``config`` and return what it printed.

    Args:
        dies_at: a moment of `integration.launch.crash` at which every process gets SIGKILL.

    Raises:
        TrainingFailed: it failed, or lived on where it should have died.
    """
    own = environment(config)
    if dies_at:
        own[crash.VARIABLE] = dies_at
    started = subprocess.Popen(
        command(config, ranks), env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = started.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        log, _ = started.communicate()
        raise TrainingFailed(f"{config.name} did not end in {timeout_seconds:.0f} s:\n{log[-6000:]}") from None
    if started.returncode != (-signal.SIGKILL if dies_at else 0):
        raise TrainingFailed(f"{config.name} ended with {started.returncode}:\n{log[-6000:]}")
    return log
