"""Lets methods take turns: in one process, in one each, or one after the other."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm

from axolotl_spft.bench.contestant import Contestant, reason_to_leave_out, set_threads
from axolotl_spft.bench.methods import LeftOut
from axolotl_spft.bench.options import Options
from axolotl_spft.bench.shapes import model_config
from axolotl_spft.errors import SpftError, first_line


def compare(options: Options) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure every method of ``options``.

    Returns:
        One row of `Contestant.figures` per method, and method -> reason for those that were left out; each of these is
        also printed as it is found out.
    """
    set_threads(options)
    # before any process starts
    model_config(options.model, options.tokens, options.width)
    left_out = {name: reason for name in options.methods if (reason := reason_to_leave_out(name, options))}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    names = [name for name in options.methods if name not in left_out]
    rows = []
    for group in [[name] for name in names] if options.processes == "sequential" else [names]:
        rows += _take_turns(group, options, left_out)
    return rows, left_out


def _take_turns(names: list[str], options: Options, left_out: dict[str, str]) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        contestants: dict[str, Contestant | _Worker] = {}
        if options.processes != "shared":
            contestants = {name: stack.enter_context(_worker(name, options)) for name in names}
            for worker in contestants.values():
                worker.wait_until_started()
        for name in tqdm(names, desc="Preparing", unit="method", leave=False, disable=len(names) == 1):
            try:
                if options.processes == "shared":
                    contestants[name] = _in_this_process(name, options)
                else:
                    # one at a time: the time of the salience pass is measured
                    contestants[name].prepare()
            except LeftOut as error:
                contestants.pop(name, None)
                left_out[name] = str(error)
                print(f"{name} is left out: {error}")
        with _no_garbage_collection():
            for round_ in tqdm(range(options.rounds), desc="Rounds" if len(names) > 1 else names[0]):
                # every other round backwards: no method always runs after the same one
                for name in list(contestants) if round_ % 2 else reversed(contestants):
                    contestants[name].round()
        return [contestant.figures() for contestant in contestants.values()]


def _in_this_process(name: str, options: Options) -> Contestant:
    try:
        return Contestant(name, options, own_process=False)
    except torch.OutOfMemoryError as error:
        reason = _does_not_fit(error)
    # outside the handler, whose traceback would keep the half-made model alive
    clear_device_cache(garbage_collection=True)
    raise LeftOut(reason)


def _does_not_fit(error: torch.OutOfMemoryError) -> str:
    return f"it does not fit ({first_line(error)}); fewer methods, --isolate, --sequential or a 4-bit base may"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Worker:
    """A `Contestant` in another process."""

    def __init__(self, name: str, connection: Connection):
        self.name, self._connection = name, connection

    def wait_until_started(self) -> None:
        self._answer()

    def prepare(self) -> None:
        self._ask("prepare")

    def round(self) -> None:
        self._ask("round")

    def figures(self) -> dict[str, Any]:
        return self._ask("figures")

    def _ask(self, request: str) -> Any:
        # of a process that has ended the answer tells
        with suppress(ConnectionError):
            self._connection.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, content = self._connection.recv()
        except (EOFError, ConnectionError):
            raise SpftError(
                f"the process of {self.name} ended without a word: the system may be out of memory"
            ) from None
        if kind == "left out":
            raise LeftOut(content)
        if kind == "error":
            raise SpftError(f"the process of {self.name} failed:\n{content}")
        return content


@contextmanager
def _worker(name: str, options: Options) -> Iterator[_Worker]:
    """A process that lives until the end of the block."""
    # spawn: a fork of a process that has used a GPU cannot use it
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, options), daemon=True)
    process.start()
    there.close()
    try:
        yield _Worker(name, here)
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, name: str, options: Options) -> None:
    try:
        connection.send(("started", None))
        connection.recv()
        contestant = Contestant(name, options, own_process=True)
        connection.send(("prepared", None))
        with _no_garbage_collection():
            while True:
                request = connection.recv()
                connection.send(("done", getattr(contestant, request)()))
    except EOFError:
        pass  # nothing more is asked
    except torch.OutOfMemoryError as error:
        connection.send(("left out", _does_not_fit(error)))
    except LeftOut as error:
        connection.send(("left out", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))
