"""An adapter that is the weighted sum of other adapters of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTuner

from axolotl_spft.config import RECORDED
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.state import spft_layers

# options that say how many values an adapter has, and where
_NOT_OF_A_SUM = ("density", "match_lora_rank", "density_pattern", "min_density", "max_density", "exclude_modules",
                 "layers_to_transform", "layers_pattern")  # fmt: skip


def add_weighted_adapter(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See `axolotl_spft.SpftModel.add_weighted_adapter`."""
    problem = _problem_of(model, adapters, weights, adapter_name, combination_type)
    if problem:
        raise SpftError(f"add_weighted_adapter: {problem}")
    layers = {name: layer for name, layer in spft_layers(model.model).items() if set(adapters) & set(layer.spft_values)}
    model.peft_config[adapter_name] = config = replace(
        model.peft_config[adapters[0]],
        **dict.fromkeys(_NOT_OF_A_SUM),
        **dict.fromkeys(RECORDED),
        num_values=1,
        target_modules=list(layers),
        mask_path=None,
        reselect=None,
        init_weights=True,
        pattern="element",
    )
    model.inject_adapter(model.model, adapter_name)
    summed: dict[str, float] = {}
    for name, weight in zip(adapters, weights):
        summed[name] = summed.get(name, 0.0) + weight
    for layer in layers.values():
        layer.add_up(adapter_name, summed)
    config.num_values = sum(layer.mask(adapter_name).nnz for layer in layers.values())
    record_mask(model, adapter_name, {"sum of": summed})


def _problem_of(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> str | None:
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or not adapters:
        return f"`adapters: {list(adapters)}` must name adapters of this model, which are {list(model.peft_config)}"
    if len(weights) != len(adapters):
        return f"there are {len(adapters)} adapters, but {len(weights)} weights: give one for each"
    if adapter_name in model.peft_config:
        return f"there is an adapter `{adapter_name}` already: choose another name, or delete_adapter() it first"
    if combination_type != "linear":
        return f"`combination_type: {combination_type}` must be linear"
    if model._has_auxiliary_modules():
        return "adapters with `modules_to_save` cannot be added up: merge one of them into the base model instead"
    if any(layer.merged for layer in spft_layers(model.model).values()):
        return "an adapter is merged: call unmerge_adapter() first"
    if not any(layer.mask(name).nnz for layer in spft_layers(model.model).values() for name in adapters
               if name in layer.spft_values):  # fmt: skip
        return f"the adapters {list(adapters)} hold no values yet: call select_mask() first"
    return None
