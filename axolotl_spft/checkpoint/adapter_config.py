"""The ``adapter_config.json`` of an adapter that was made from files, not by training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_spft.checkpoint.adapter import SavedDelta
from axolotl_spft.config import SpftConfig
from axolotl_spft.tuner.state import shapes_fingerprint


def config_of(
    deltas: Mapping[str, SavedDelta],
    source: Mapping[str, Any],
    base: str | None,
    has_shapes: bool = True,
    in_model_order: bool = False,
    task_type: str | None = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """What PEFT needs to load these deltas.

    Args:
        source: what ``mask_source`` records of where they come from.
        base: name of the base model.
        target_parameters: which of the deltas are the weights of experts, by the names in the option of this name.
        in_model_order: whether the deltas are in the order of the modules in the model, as the fingerprint has them.
    """
    nnz = sum(delta.mask.nnz for delta in deltas.values())
    experts = [name for name in deltas if any(f".{name}".endswith(f".{each}") for each in target_parameters)]
    config = SpftConfig(
        num_values=max(nnz, 1),
        target_modules=[name for name in deltas if name not in experts],
        target_parameters=experts or None,
        modules_to_save=list(modules_to_save) or None,
        base_model_name_or_path=base,
        task_type=task_type,
        inference_mode=True,
    )
    config.nnz, config.mask_source = nnz, dict(source)
    if has_shapes and in_model_order:
        config.base_shapes = shapes_fingerprint((name, *delta.shape) for name, delta in deltas.items())
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
