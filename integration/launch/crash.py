"""A run that dies by SIGKILL at a chosen moment, for the proof that it can be resumed.

``SPFT_CRASH`` names the moment, and the how-many-th of its kind it is:

    salience:2      before the loss of the second batch of the salience pass
    step:5          between the backward passes and the update of the fifth optimizer step
    checkpoint:2    in the second checkpoint, with the adapter written and the next file half written
    reselection:9   while the ninth matrix of all is exchanged, among those of a re-selection of a dynamic mask
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import torch

VARIABLE = "SPFT_CRASH"
MOMENTS = ("salience", "step", "checkpoint", "reselection")


def arm() -> None:
    """Put the crash that ``SPFT_CRASH`` asks for, if it does, into the trainer."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    moment, _, number = wanted.partition(":")
    if moment not in MOMENTS or not number.isdigit():
        raise ValueError(f"{VARIABLE}={wanted} must be one of {', '.join(MOMENTS)}, a colon and a number")
    from transformers import Trainer

    from axolotl_spft.dynamic.history import History
    from axolotl_spft.trainer.salience_pass import _TrainerSample

    if moment == "salience":
        _before_call(int(number), _TrainerSample, "loss", _die)
    elif moment == "step":
        _before_call(int(number), Trainer, "_clip_grad_norm", _die)
    elif moment == "reselection":
        _before_call(int(number), History, "move", _die)
    else:
        _before_call(int(number), Trainer, "_save_optimizer_and_scheduler", _die_in_next_save)


def _before_call(number: int, owner: type, name: str, act: Callable[[], None]) -> None:
    function, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def _die() -> None:
    # the launcher and the other ranks with it: as when the machine loses power
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = psutil.Process(os.getppid())
        ranks = [process for process in launcher.children(recursive=True) if process.pid != os.getpid()]
        for process in (launcher, *ranks):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_next_save() -> None:
    save = torch.save

    def save_half(content: Any, file: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        buffer = BytesIO()
        save(content, buffer)
        whole = buffer.getvalue()
        Path(file).write_bytes(whole[: len(whole) // 2])
        _die()

    torch.save = save_half
