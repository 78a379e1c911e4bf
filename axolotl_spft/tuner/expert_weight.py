"""How a module of experts stores its weights: in parameters of three dimensions, plain or quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# classes of transformers that store (experts, in_features, out_features) without saying so
_TRANSPOSED = ("Llama4TextExperts", "AriaGroupedExpertsGemm")


def stores_transposed(module: nn.Module) -> bool:
    """Whether the experts' weights are stored as (experts, in_features, out_features)."""
    told = getattr(module, "is_transposed", None)
    return type(module).__name__ in _TRANSPOSED if told is None else bool(told)


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Whether a parameter is computed from others by torch's parametrization, as bitsandbytes has 4-bit experts."""
    parametrizations = module._modules.get("parametrizations")
    return parametrizations is not None and name in parametrizations


def quantized_part(module: nn.Module, name: str) -> Tensor | None:
    """What is held of a parametrized parameter; None for a plain one."""
    return module.parametrizations[name].original if is_parametrized(module, name) else None


def shape_in(module: nn.Module, name: str) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has partitioned it or it is quantized."""
    if is_parametrized(module, name):
        kept = next(iter(module.parametrizations[name]))
        state = getattr(kept, "quant_state", None)
        return getattr(module, name).shape if state is None else torch.Size(state.shape)
    parameter = module._parameters[name]
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def weights_of(module: nn.Module) -> Iterator[str]:
    """The names of the module's own parameters of three dimensions, plain or parametrized, but of torch's classes."""
    if type(module).__module__.startswith("torch.nn.modules"):
        # convolutions
        return
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    names += list(module._modules.get("parametrizations") or ())
    for name in names:
        if len(shape_in(module, name)) == 3:
            yield name
