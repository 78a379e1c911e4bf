"""The parameters that ``target_parameters`` names: weights of experts, of three dimensions."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from axolotl_spft.errors import first_of
from axolotl_spft.tuner.expert_weight import is_parametrized, shape_in, weights_of
from axolotl_spft.tuner.experts import SpftExperts

_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")


class Found(NamedTuple):
    """A parameter of three dimensions.

    Attributes:
        name: of the parameter where no adapter wraps its module.
        module_name: of its module, likewise.
        parameter_name: in its module.
        module: the module itself.
    """

    name: str
    module_name: str
    parameter_name: str
    module: nn.Module

    @property
    def shape(self) -> torch.Size:
        return shape_in(self.module, self.parameter_name)


def is_of_experts(name: str) -> bool:
    """Whether a name says that it is something of experts."""
    return bool(_EXPERT.search(name))


def stacked_parameters(model: nn.Module) -> Iterator[Found]:
    """Every parameter of three dimensions that is no convolution's, in the model's order."""
    for name, module in model.named_modules():
        module_name = _without_wrappers(name)
        if "parametrizations" in name.split("."):
            continue
        for parameter_name in weights_of(module):
            full_name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            yield Found(full_name, module_name, parameter_name, module)


def experts_in(model: nn.Module) -> list[Found]:
    """The parameters of three dimensions that are the weights of experts, as far as names and sizes tell."""
    return [
        found
        for found in stacked_parameters(model)
        if found.shape[0] > 1
        and (is_of_experts(found.name) or getattr(found.module, "num_experts", None) == found.shape[0])
    ]


def problem_of_parameter(name: str, model: nn.Module) -> str | None:
    """What is wrong with a name in ``target_parameters``; None where it is that of parameters of three dimensions."""
    if any(_is_meant(name, found.name) for found in stacked_parameters(model)):
        return None
    kind = type(model).__name__
    for full_name, parameter in model.named_parameters():
        full_name = _without_wrappers(full_name)
        if _is_meant(name, full_name):
            owner, _, last = full_name.rpartition(".")
            return (
                f"`target_parameters: {name}` is {full_name} of the {kind}, a parameter of {parameter.ndim} dimensions "
                f"{tuple(parameter.shape)}: parameters of three dimensions, which hold the weights of experts, can be "
                "trained so"
                + (f"; name a linear layer's module in `target_modules: [{owner}]`" if last == "weight" else "")
            )
    near = sorted({_short(found.name) for found in experts_in(model)})
    remedy = f"name some of {', '.join(near)}" if near else "it has none of three dimensions, so leave the key out"
    return f"`target_parameters: {name}` matches no parameter of the {kind}: {remedy}"


def warn_of_untrained_experts(model: nn.Module) -> None:
    """Say which experts ``all-linear`` leaves as they are, how many weights these are, and what would train them."""
    found = experts_in(model)
    if not found:
        return
    count = sum(prod(each.shape) for each in found)
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    # of parametrized weights the model's own count is of bytes
    share = "" if any(is_parametrized(each.module, each.parameter_name) for each in found) else (
        f", {100 * count / total:.3g}% of the model"
    )  # fmt: skip
    names = sorted({_short(each.name) for each in found})
    warnings.warn(
        f"`target_modules: all-linear` takes linear layers alone and leaves the experts untrained: "
        f"{first_of([each.name for each in found], ', ')} ({count:,} weights{share}); to train them add "
        f"`target_parameters: [{', '.join(names)}]`",
        stacklevel=2,
    )


def inject_parameters(model: nn.Module, config: Any, adapter_name: str, is_active: bool) -> list[str]:
    """Give every parameter that the config's ``target_parameters`` name an empty adapter; the parameters' names.

    ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` choose among them as among modules.

    Raises:
        TypeError: a parameter cannot have a sparse delta.
    """
    as_modules = copy.copy(config)
    as_modules.target_modules = set(config.target_parameters)
    injected = []
    for found in list(stacked_parameters(model)):
        if not _is_chosen(as_modules, found):
            continue
        _check(found)
        owner = model.get_submodule(found.module_name)
        if isinstance(owner, BaseTunerLayer):
            raise TypeError(
                f"the module of `{found.name}` is adapted by a {type(owner).__module__}.{type(owner).__name__} "
                "already: merge that adapter first (merge_and_unload())"
            )
        if not isinstance(owner, SpftExperts):
            parent, _, last = found.module_name.rpartition(".")
            owner = SpftExperts(owner)
            setattr(model.get_submodule(parent), last, owner)
        matrix = owner.add_adapter(found.parameter_name, adapter_name)
        if not is_active:
            matrix.requires_grad_(False)
        injected.append(found.name)
    return injected


def _is_chosen(config: Any, found: Found) -> bool:
    excluded = copy.copy(config)
    excluded.target_modules = {found.module_name}
    # a name in exclude_modules may be the module's or the parameter's
    return bool(
        check_target_module_exists(config, found.name) and check_target_module_exists(excluded, found.module_name)
    )


def _check(found: Found) -> None:
    if not found.module_name:
        raise TypeError(f"`{found.name}` is a parameter of the model itself, in which there is no module to adapt")
    if is_parametrized(found.module, found.parameter_name):
        return
    parameter = found.module._parameters[found.parameter_name]
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise TypeError(
            f"`{found.name}` is of {parameter.dtype}, and a sparse delta needs weights of 16 bits or more, or experts "
            "that bitsandbytes has quantized to 4 bits (replace_parameter_4bit): load the model dequantized"
        )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _is_meant(name: str, full_name: str) -> bool:
    return f".{full_name}".endswith(f".{name}")


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])
