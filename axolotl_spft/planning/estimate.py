"""The memory of a whole run on each GPU, part by part."""

from __future__ import annotations

from typing import NamedTuple

from axolotl_spft.budget import total_budget
from axolotl_spft.config_rules import BUDGETS, DEFAULT_DENSITY
from axolotl_spft.engine.memory import memory_per_rank
from axolotl_spft.planning.activations import activations
from axolotl_spft.planning.settings import Settings
from axolotl_spft.planning.shapes import ModelShape
from axolotl_spft.reselect_rules import Reselect
from axolotl_spft.salience.groups import why_at_once
from axolotl_spft.salience.metrics.metric import accumulators_of, load_metric

GIB = 2**30
# of the CUDA context, and of gaps between allocations
RESERVE_BYTES = GIB
# bytes of an entry of a quantized weight: nf4 with its scales in 8 bits for each 64; int8 (and 4 bytes for each row)
_NF4_BYTES, _INT8_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256), 1.0


class Estimate(NamedTuple):
    """Bytes on one GPU (the adapter's file, and what lies on the host, aside).

    Attributes:
        values: how many are trained.
        entries: of the targeted matrices.
        base, trained, indices, gradients, optimizer: as `memory_per_rank` counts them.
        activations: the most that a pass needs beside these, without the gradients.
        peak: the most while it trains.
        salience: the accumulators, and one matrix' gradient, on the GPU.
        salience_host: accumulators for which the GPU has no room.
        salience_peak: the most in the pass before training.
        collected: what a re-selection keeps of its micro-batches until the optimizer has stepped, on the GPU.
        collected_host: of that, what the GPU has no room for.
        file: of the saved adapter.
    """

    values: int
    entries: int
    base: int
    trained: int
    indices: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    salience: int
    salience_host: int
    salience_peak: int
    collected: int
    collected_host: int
    file: int

    @property
    def needed(self) -> int:
        """The memory that a GPU must have."""
        return max(self.peak, self.salience_peak) + RESERVE_BYTES


def estimate(shape: ModelShape, run: Settings, gpu_bytes: int) -> Estimate:
    """What ``run`` needs on each GPU.

    Args:
        gpu_bytes: of one GPU: where whole accumulators would take more than half of what is left of it, or than
            ``salience_memory_gib``, the salience pass shares them out, or holds them on the host.
    """
    budget = {name: run.options.get(name) for name in BUDGETS}
    if not any(value is not None for value in budget.values()):
        budget["density"] = DEFAULT_DENSITY
    entries = sum(rows * columns for rows, columns in shape.targets)
    nnz = total_budget(shape.targets, **budget, density_pattern=run.options.get("density_pattern"), names=shape.names)
    low_precision = run.engine.startswith("zero") and run.dtype_bytes == 2
    value_bytes = 2 if low_precision else run.value_bytes
    in_place = run.bits == 16 and run.engine != "zero3"
    # an unquantized entry for each value
    repaired_bytes = 2 if run.options.get("repair") and run.bits < 16 else 0
    metric = load_metric(run.options.get("salience", "gradient"))
    accumulators = accumulators_of(metric.needs) if run.chooses_mask else 0
    parts = memory_per_rank(
        base_bytes=base_bytes(shape, run),
        shapes=shape.targets,
        nnz=nnz,
        value_bytes=value_bytes,
        original_bytes=run.dtype_bytes if in_place else repaired_bytes,
        engine=run.engine,
        world=run.gpus,
        # other optimizers of the AdamW kind keep as much
        state_bits=run.state_bits or 32,
        others=(shape.saved_entries, value_bytes),
        buckets=run.buckets,
        accumulators=0,
    )
    base = 0 if run.offload_base else parts.base
    optimizer = 0 if run.offload_optimizer else parts.optimizer
    gathered = gathered_entries(shape, run) * run.dtype_bytes
    passed = activations(shape, run, nnz / entries)
    keeps = run.accumulates or run.engine.startswith("zero")
    held = base + parts.values + parts.indices + optimizer
    peak = held + gathered + passed.peak(parts.gradients, keeps)
    without_gradients = passed.peak(0, keeps_gradients=False)
    dense = activations(shape, run, None).peak(0, keeps_gradients=False)
    largest = 4 * max(rows * columns for rows, columns in shape.targets)
    collected = collected_bytes(shape, run)
    # of what a pass before has left free
    kept_on_gpu = min(collected, max(0, gpu_bytes - peak - RESERVE_BYTES) // 2)
    if collected:
        # beside it a pass, or the gradient of a matrix and its score
        peak = max(peak, held + 2 * largest) + kept_on_gpu
    on_gpu, on_host = 0, 0
    if accumulators:
        whole = 4 * accumulators * entries
        memory_gib = run.options.get("salience_memory_gib")
        room = max(0, gpu_bytes - base - RESERVE_BYTES) // 2 if memory_gib is None else int(memory_gib * GIB)
        scope, pattern = run.options.get("scope", "layer"), run.options.get("pattern", "element")
        if memory_gib is not None and why_at_once(scope, pattern, metric) is None:
            # one group of matrices after the other
            whole = min(whole, max(room, accumulators * largest))
        if run.gpus > 1 and (run.engine == "zero3" or whole > room):
            whole //= run.gpus
        on_gpu, on_host = (whole + largest, 0) if whole <= room else (largest, whole)
    return Estimate(
        values=nnz,
        entries=entries,
        base=base,
        trained=parts.values,
        indices=parts.indices,
        gradients=parts.gradients,
        optimizer=optimizer,
        activations=gathered + without_gradients,
        peak=peak,
        salience=on_gpu,
        salience_host=on_host,
        # the pass gathers one module at a time
        salience_peak=base + (widest_entries(shape) * run.dtype_bytes if gathered else 0) + on_gpu + dense
        if accumulators
        else 0,
        collected=kept_on_gpu,
        collected_host=collected - kept_on_gpu,
        file=file_bytes(shape, nnz, run.value_bytes) + nnz * repaired_bytes,
    )


def collected_bytes(shape: ModelShape, run: Settings) -> int:
    """X and dY of the micro-batches from which a re-selection makes its dense gradients; 0 without `reselect`."""
    reselect = run.options.get("reselect")
    if reselect is None:
        return 0
    return Reselect(**reselect).collect * run.rows * run.sequence_len * shape.collected * run.dtype_bytes


def gathered_entries(shape: ModelShape, run: Settings) -> int:
    """Entries of the weights that ZeRO-3 holds whole at the worst moment of training, the end of the forward pass.

    It keeps what the backward pass uses again within ``run.reused`` elements, counted there and back, and gathers
    ``run.prefetched`` ahead, of which there are two copies for a moment.
    """
    if run.engine != "zero3":
        return 0
    whole = sum(rows * columns for rows, columns in shape.quantizable) + shape.other_entries
    held = max(widest_entries(shape), run.reused // 2)
    return min(whole, held + run.prefetched) + min(whole, run.prefetched)


def widest_entries(shape: ModelShape) -> int:
    """Entries of the largest module, which most often is the output head."""
    return max(shape.head_entries, *(rows * columns for rows, columns in shape.quantizable), 0)


def base_bytes(shape: ModelShape, run: Settings) -> int:
    """The frozen weights, whole."""
    entries = sum(rows * columns for rows, columns in shape.quantizable)
    others = shape.other_entries * run.dtype_bytes
    if run.bits == 4:
        return round(entries * _NF4_BYTES) + others
    if run.bits == 8:
        return round(entries * _INT8_BYTES) + 4 * sum(rows for rows, _ in shape.quantizable) + others
    return entries * run.dtype_bytes + others


def file_bytes(shape: ModelShape, nnz: int, value_bytes: int) -> int:
    """``adapter_model.safetensors`` without its header: values, columns, row offsets; modules that are saved whole."""
    entries = sum(rows * columns for rows, columns in shape.targets)
    wide = sum(rows * columns for rows, columns in shape.targets if columns > 2**16)
    per_value = value_bytes + 2 + 2 * wide / entries
    offsets = 4 * sum(rows + 1 for rows, _ in shape.targets)
    return round(nnz * per_value) + offsets + shape.saved_entries * value_bytes
