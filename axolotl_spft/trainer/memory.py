"""The memory of a run that is about to start, from its model and its trainer's arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from axolotl_spft.budget import total_budget
from axolotl_spft.engine.memory import MemoryPerRank, memory_per_rank
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import count_of
from axolotl_spft.salience.collect import should_share_rows
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import accumulators_of, load_metric
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of


def memory_of_run(model: nn.Module, args: Any, engine: str, ranks: Ranks, state_bits: int) -> MemoryPerRank:
    """The bytes on one rank.

    Args:
        model: a `PeftModel` whose active adapter is of this package, with a mask or without one yet.
        args: the trainer's `TrainingArguments`.
        engine: of `engine_of`.
        ranks: of the run.
        state_bits: of the optimizer's moments.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    named = {name: layer for name, layer in adapted_layers(model).items() if adapter in layer.spft_values}
    layers = list(named.values())
    shapes = list(shapes_of(named).values())
    held = sum(layer.mask(adapter).nnz for layer in layers)
    values = {id(layer.spft_values[adapter]) for layer in layers}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in values]
    first = layers[0]
    accumulators = 0 if held else accumulators_of(load_metric(config.salience).needs)
    low_precision = engine.startswith("zero") and (args.bf16 or args.fp16)
    return memory_per_rank(
        base_bytes=sum(count_of(parameter) * parameter.element_size() for parameter in frozen),
        shapes=shapes,
        nnz=held or total_budget(shapes, **config.budget(list(named))),
        value_bytes=2 if low_precision else first.spft_values[adapter].element_size(),
        original_bytes=_original_bytes(config.repair, layers),
        engine=engine,
        world=ranks.world,
        state_bits=state_bits,
        buckets=_bucket_elements(args),
        others=(sum(map(count_of, others)), 2 if low_precision or not others else others[0].element_size()),
        accumulators=accumulators,
        shares_rows=should_share_rows(named, ranks, accumulators, config.salience_memory_gib),
    )


def _original_bytes(repair: float, layers: list[SparseLayer]) -> int:
    """Of the entry of W that is kept for each value: to put it back, or of a repaired one from before quantization."""
    if layers[0].in_place:
        return layers[0].stored_weight.element_size()
    repaired = repair or any(len(layer.spft_originals) for layer in layers)
    return 2 if repaired and any(layer.repairs for layer in layers) else 0


def _bucket_elements(args: Any) -> int:
    settings = getattr(args, "hf_deepspeed_config", None)
    zero = settings.config.get("zero_optimization", {}) if settings else {}
    size = zero.get("reduce_bucket_size", 500_000_000) if zero.get("stage") else 0
    # "auto" until the engine is made: then the square of the hidden size, a few million
    return (2 if zero.get("overlap_comm") else 1) * size if isinstance(size, int) else 0
