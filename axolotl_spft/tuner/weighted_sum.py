"""An adapter that is a weighted combination of other adapters of the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from axolotl_spft.config import RECORDED
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.load import record_mask, recorded_base
from axolotl_spft.tuner.state import spft_layers
from axolotl_spft.tuner.trained_on import common

_COMBINATIONS = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
# options that say how many values an adapter has, and where
_NOT_OF_A_SUM = ("density", "match_lora_rank", "density_pattern", "min_density", "max_density", "exclude_modules",
                 "layers_to_transform", "layers_pattern")  # fmt: skip


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """See `axolotl_spft.SpftModel.add_weighted_adapter`."""
    if adapter_name in model.peft_config:
        warnings.warn(
            f"add_weighted_adapter: there is an adapter `{adapter_name}` already, which stays as it is: choose another "
            "name, or delete_adapter() it first",
            stacklevel=3,
        )
        return
    problem = _problem_of(model, adapters, weights, combination_type, density, majority_sign_method)
    if problem:
        raise SpftError(f"add_weighted_adapter: {problem}")
    layers = {name: layer for name, layer in spft_layers(model.model).items() if set(adapters) & set(layer.spft_values)}
    model.peft_config[adapter_name] = config = replace(
        model.peft_config[adapters[0]],
        **dict.fromkeys(_NOT_OF_A_SUM),
        **dict.fromkeys(RECORDED),
        num_values=1,
        target_modules=[name for name, layer in layers.items() if not isinstance(layer, ExpertMatrix)],
        target_parameters=[name for name, layer in layers.items() if isinstance(layer, ExpertMatrix)] or None,
        mask_path=None,
        reselect=None,
        init_weights=True,
        pattern="element",
    )
    model.inject_adapter(model.model, adapter_name)
    combine, options = task_arithmetic, {}
    if combination_type != "linear":
        # what the masks leave out stands for the trimming of which the methods speak
        options = {"density": 1.0 if density is None else density}
        if "ties" in combination_type:
            options["majority_sign_method"] = majority_sign_method
        combine = partial(_COMBINATIONS[combination_type], **options)
        options = {"combination_type": combination_type} | options
    summed: dict[str, float] = {}
    for name, weight in zip(adapters, weights):
        summed[name] = summed.get(name, 0.0) + weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning")
        for layer in layers.values():
            layer.add_up(adapter_name, list(zip(adapters, weights)), combine)
    config.num_values = sum(layer.mask(adapter_name).nnz for layer in layers.values())
    replacing = [layer for layer in layers.values() if adapter_name in layer.spft_originals]
    if replacing:
        options["repaired"] = sum(layer.mask(adapter_name).nnz for layer in replacing)
    base = common(recorded_base(model, name) for name in summed)
    record_mask(model, adapter_name, {"sum of": summed} | options, base)


def _problem_of(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> str | None:
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or not adapters:
        return f"`adapters: {list(adapters)}` must name adapters of this model, which are {list(model.peft_config)}"
    if len(weights) != len(adapters):
        return f"there are {len(adapters)} adapters, but {len(weights)} weights: give one for each"
    if not all(isfinite(weight) for weight in weights):
        return f"`weights: {list(weights)}` must be finite numbers"
    if combination_type not in _COMBINATIONS:
        return f"`combination_type: {combination_type}` must be one of {', '.join(_COMBINATIONS)}"
    if density is not None and not (combination_type != "linear" and 0 < density <= 1):
        return f"`density: {density}` must be a number in (0, 1], and goes with another `combination_type` than linear"
    if majority_sign_method not in ("total", "frequency"):
        return f"`majority_sign_method: {majority_sign_method}` must be total or frequency"
    if model._has_auxiliary_modules():
        return "adapters with `modules_to_save` cannot be added up: merge one of them into the base model instead"
    if any(model.peft_config[name].bias != "none" for name in adapters):
        return "adapters with `bias: all` cannot be added up: merge one of them into the base model instead"
    if any(layer.merged for layer in spft_layers(model.model).values()):
        return "an adapter is merged: call unmerge_adapter() first"
    if not any(layer.mask(name).nnz for layer in spft_layers(model.model).values() for name in adapters
               if name in layer.spft_values):  # fmt: skip
        return f"the adapters {list(adapters)} hold no values yet: call select_mask() first"
    return None
