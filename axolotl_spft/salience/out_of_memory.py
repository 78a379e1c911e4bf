"""Out of memory in the salience pass: one error, on all ranks, that names what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError, SpftMemoryError, first_line

_MESSAGE = (
    "the salience pass ran out of memory ({}): lower `micro_batch_size` (or the rows of each batch), or "
    "`salience_memory_gib`, which leaves more for the batches; set `gradient_checkpointing: true`; "
    "`auto_find_batch_size: true` tries with fewer rows by itself. `samples` costs time, not memory"
)


def run_on_all_ranks(step: Callable[[], None], ranks: Ranks, sharded: bool) -> None:
    """``step()``, a forward and backward pass.

    Args:
        sharded: whether ranks wait for each other inside; they then cannot be told of one that failed.

    Raises:
        SpftMemoryError: on every rank, where one ran out of memory.
        SpftError: on the rank that ran out of memory, where ``sharded``.
    """
    failure = None
    try:
        step()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        failure = error
    if sharded:
        if failure is not None:
            raise SpftError(_MESSAGE.format(first_line(failure))) from failure
    elif ranks.sum_numbers(int(failure is not None))[0]:
        raise SpftMemoryError(_MESSAGE.format(first_line(failure) if failure else "on another rank")) from failure


@contextmanager
def named_out_of_memory(ranks: Ranks) -> Iterator[None]:
    """Raise `SpftMemoryError`, or with several ranks `SpftError`, for what runs out of memory within the block."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        kind = SpftError if ranks.world > 1 else SpftMemoryError
        raise kind(_MESSAGE.format(first_line(error))) from error
