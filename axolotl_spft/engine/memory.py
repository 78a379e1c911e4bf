"""What sparse fine-tuning keeps in memory on each rank, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_MIB = 2**20
# uint8 with one float32 scale for each block of 256, both moments
_MOMENT_BYTES = {32: 8.0, 8: 2 * (1 + 4 / 256)}


class MemoryPerRank(NamedTuple):
    """Bytes on one rank; ``str(...)`` is a table.

    Attributes:
        base: the frozen weights.
        values: the trained parameters in the dtype of the forward pass.
        indices: masks and the weights' original entries.
        gradients: of the trained parameters, with what the engine keeps to accumulate and send them.
        optimizer: moments and float32 masters.
        salience: the accumulators of the salience pass and its largest dense gradient; freed before training.
    """

    base: int
    values: int
    indices: int
    gradients: int
    optimizer: int
    salience: int

    def __str__(self) -> str:
        names = {
            "base": "base weights", "values": "trained values", "indices": "masks and originals",
            "gradients": "gradients", "optimizer": "moments and masters", "salience": "salience pass (before training)",
        }  # fmt: skip
        lines = [f"{names[field]:32} {getattr(self, field) / _MIB:12,.1f} MiB" for field in self._fields]
        training = sum(self) - self.salience
        return "\n".join(
            ["Memory per rank, without activations:", *lines, f"{'in training':32} {training / _MIB:12,.1f} MiB"]
        )


def memory_per_rank(
    base_bytes: int,
    shapes: Sequence[tuple[int, int]],
    nnz: int,
    value_bytes: int,
    original_bytes: int,
    engine: str,
    world: int,
    state_bits: int = 32,
    others: tuple[int, int] = (0, 4),
    buckets: int = 0,
    accumulators: int = 1,
    shares_rows: bool = False,
) -> MemoryPerRank:
    """The bytes that one rank needs.

    Args:
        base_bytes: of the whole frozen model.
        shapes: (out_features, in_features) of each targeted matrix.
        nnz: sparse values over all matrices.
        value_bytes: of a value in the forward pass: 4 or 2.
        original_bytes: of the base weight's entry that is kept for each value; 0 where W + S is made afresh.
        engine: of `engine_of`.
        world: ranks.
        state_bits: of the moments, 32 or 8.
        buckets: elements of DeepSpeed's buckets, which it allocates whole to send gradients from.
        others: entries of the parameters that are trained whole (``modules_to_save``), and the bytes of each.
        accumulators: float32 matrices that the salience pass keeps for each weight; 0 where there is none.
        shares_rows: whether each rank accumulates its own rows of them only; under ZeRO-3 it always does.
    """
    trained = [(nnz, value_bytes), others]
    count, values = sum(entries for entries, _ in trained), sum(entries * each for entries, each in trained)
    stage = int(engine[-1]) if engine.startswith("zero") else 0
    columns = [2 if in_features <= 2**16 else 4 for _, in_features in shapes]
    entries = [out_features * in_features for out_features, in_features in shapes]
    # a column and an original each; spread evenly over the entries
    per_value = sum(n * column for n, column in zip(entries, columns)) / sum(entries)
    indices = nnz * (per_value + original_bytes) + sum(4 * (out_features + 1) for out_features, _ in shapes)
    if stage:
        # float32; whole on every rank until stage 2 leaves each rank its part
        gradients = 4 * count / (world if stage >= 2 else 1) + buckets * value_bytes
        masters = 4 * count
    else:
        # DistributedDataParallel sends them from buckets of its own
        gradients = values * (2 if world > 1 else 1)
        masters = sum(4 * entries for entries, each in trained if each < 4)
    optimizer = (count * _MOMENT_BYTES[state_bits] + masters) / (world if stage else 1)
    sums = 4 * accumulators * sum(entries) / (world if stage == 3 or shares_rows else 1)
    salience = sums + 4 * max(entries) if accumulators else 0
    return MemoryPerRank(
        base=-(-base_bytes // world) if stage == 3 else base_bytes,
        values=-(-values // (world if stage == 3 else 1)),
        indices=round(indices),
        gradients=round(gradients),
        optimizer=round(optimizer),
        salience=round(salience),
    )
