"""How a module of experts stores its weights: in parameters of three dimensions, plain or quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


def weight_in(module: nn.Module, name: str) -> Tensor:
    """A parameter, computed if it is parametrized, whatever stands in its place (`replaced`)."""
    if not is_parametrized(module, name):
        return module._parameters[name]
    # past the property that torch's parametrization makes: within a forward pass it keeps what it is asked for
    parametrization = module.parametrizations[name]
    given = parametrization.__dict__.get("forward")
    return given.compute() if isinstance(given, _Given) else parametrization()


@contextmanager
def replaced(module: nn.Module, name: str, weight: object) -> Iterator[None]:
    """Within the block the module finds ``weight`` in the place of a parameter, which itself stays where it is.

    So do all threads that use the module: one at a time may.
    """
    owner, kept = module, (id(module), name)
    if is_parametrized(module, name):
        # a property of the class, which asks this submodule
        owner, name = module.parametrizations[name], "forward"
        weight = _Given(weight, owner.forward)
    # torch keeps what a parametrized weight was as long as anybody asks it to
    parametrize._cache.pop(kept, None)
    # an attribute of the instance comes before torch's look-up of parameters, and before a method of the class
    before = owner.__dict__.get(name)
    owner.__dict__[name] = weight
    try:
        yield
    finally:
        parametrize._cache.pop(kept, None)
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


class _Given:
    """In the place of a parametrization's own forward pass, ``compute``."""

    def __init__(self, weight: object, compute: Callable[[], Tensor]):
        self._weight, self.compute = weight, compute

    def __call__(self) -> object:
        return self._weight


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
