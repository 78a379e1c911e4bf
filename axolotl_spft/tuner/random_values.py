"""Random values at random positions, which `init_weights=False` begins with."""

from __future__ import annotations

import torch
from torch import nn

from axolotl_spft.budget import layer_budgets
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.state import shapes_of, spft_layers


def fill_randomly(tuner: nn.Module, adapter_name: str) -> None:
    """Give an adapter of the `SpftModel` as many normally distributed values as its config's budget says."""
    layers = {name: layer for name, layer in spft_layers(tuner.model).items() if adapter_name in layer.spft_values}
    budget = tuner.peft_config[adapter_name].budget(list(layers))
    for layer, count in zip(layers.values(), layer_budgets(list(shapes_of(layers).values()), **budget)):
        at = torch.randperm(layer.out_features * layer.in_features)[:count].sort().values
        mask = mask_from_positions(at, layer.out_features, layer.in_features)
        layer.set_mask(adapter_name, mask, torch.randn(count, dtype=layer.spft_values[adapter_name].dtype))
    record_mask(tuner, adapter_name, None)
