"""Starts trainings on CPU ranks, to their end or to a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
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
    return _run([config], ranks, own, -signal.SIGKILL if dies_at else 0, timeout_seconds)


def train_all(
    configs: Sequence[Path], ranks: int, timeout_seconds: float = 1200, masks: Mapping[Path, Path] | None = None
) -> dict[str, str | None]:
    """Train several configurations, all with DeepSpeed or all without, in the same processes.

    Args:
        masks: configurations that are not trained: their mask is computed and saved to this file.

    Returns:
        name -> error, or None where it went well.

    Raises:
        TrainingFailed: the processes did not come to the last one.
    """
    _run(configs, ranks, environment(configs[0]), 0, timeout_seconds, masks)
    results = [json.loads(config.with_suffix(".result.json").read_text()) for config in configs]
    return {config.stem: result["error"] for config, result in zip(configs, results)}


def _run(
    configs: Sequence[Path],
    ranks: int,
    own: dict[str, str],
    expected: int,
    timeout_seconds: float,
    masks: Mapping[Path, Path] | None = None,
) -> str:
    names = ", ".join(config.name for config in configs)
    started = subprocess.Popen(
        command(configs, ranks, masks), env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = started.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        log, _ = started.communicate()
        raise TrainingFailed(f"{names} did not end in {timeout_seconds:.0f} s:\n{log[-6000:]}") from None
    if started.returncode != expected:
        raise TrainingFailed(f"{names} ended with {started.returncode}:\n{log[-6000:]}")
    return log
