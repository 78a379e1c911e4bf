"""Biases that are trained whole beside an adapter: parameters of the base model, which the adapter's file carries.

As PEFT's other methods have it, they are trained in place, so one adapter of a model may have them, and the base model
that is left when it is disabled or deleted has the trained biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor, nn

from axolotl_spft.engine.zero3 import writable
from axolotl_spft.errors import SpftFileError, first_of

NAME = "spft_bias"
# in an adapter's file, before the parameter's name, whose dots no name of a parameter may have
FILE_PREFIX = f"base_model.{NAME}."
# copies that `modules_to_save` trains and saves itself
_OTHERS = (".modules_to_save.", ".original_module.")


def hold_biases(tuner: nn.Module, adapter_name: str, trained: bool) -> None:
    """Register the biases of the base model under the adapter too, so that its file holds them.

    They are the same parameters under a second name, in every state dict.

    Args:
        tuner: the `SpftModel`.
        trained: whether they require a gradient.
    """
    if NAME not in tuner._modules:
        tuner.add_module(NAME, nn.ModuleDict())
    holder = nn.Module()
    for name, parameter in _biases_of(tuner.model):
        parameter.requires_grad_(trained)
        # past register_parameter, which makes a new parameter where accelerate keeps modules empty
        holder._parameters[name.replace(".", "/")] = parameter
    tuner._modules[NAME][adapter_name] = holder
    if not holder._parameters:
        warnings.warn(f"`bias: all`: the {type(tuner.model).__name__} has no biases, so none are trained", stacklevel=2)


def named_bias(key: str, adapter_name: str) -> str:
    """A key of an adapter's file, in the form with the adapter's name if it is a bias'."""
    named = f"{FILE_PREFIX}{adapter_name}."
    return key.replace(FILE_PREFIX, named) if key.startswith(FILE_PREFIX) and not key.startswith(named) else key


def let_go_of_biases(tuner: nn.Module, adapter_name: str) -> None:
    """Forget an adapter's biases, which stay in the base model as they are."""
    if NAME in tuner._modules and adapter_name in tuner._modules[NAME]:
        del tuner._modules[NAME][adapter_name]


def _biases_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that PEFT takes for biases, by the names that they have without adapters."""
    for name, parameter in model.named_parameters():
        is_copy = any(part in f".{name}" for part in _OTHERS)
        if "bias" in name and ".spft_" not in name and not is_copy and parameter.is_floating_point():
            yield name.replace(".base_layer.", "."), parameter


def take_biases(tuner: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, adapter_name: str) -> None:
    """Put the biases that a state dict brings for an adapter into the base model, after a check of all.

    Afterwards the dict holds the model's own parameters, for torch to put them where they are.

    Raises:
        SpftFileError: they are not those of this model.
    """
    start = f"{prefix}{NAME}.{adapter_name}."
    given = {key.removeprefix(start): tensor for key, tensor in state_dict.items() if key.startswith(start)}
    holders = tuner._modules.get(NAME)
    own = dict(holders[adapter_name]._parameters) if holders is not None and adapter_name in holders else {}
    problems = [
        f"{name.replace('/', '.')} {'is missing' if name in own else 'is in the file, but not in the model'}"
        for name in sorted(own.keys() ^ given.keys())
    ]
    problems += [
        f"{name.replace('/', '.')} is {tuple(given[name].shape)}, but {_shape(parameter)} in the model"
        for name, parameter in own.items()
        if name in given and tuple(given[name].shape) != _shape(parameter)
    ]
    problems += [
        f"{name.replace('/', '.')} holds a NaN or an infinity"
        for name, tensor in given.items()
        if not torch.isfinite(tensor).all()
    ]
    if problems:
        raise SpftFileError(
            f"adapter `{adapter_name}`: the biases in its file (`bias: all`) are not those of this model: "
            f"{first_of(problems, '; ')}. Load it on the base model it was trained on, with an intact copy of the file"
        )
    for name, parameter in own.items():
        with torch.no_grad(), writable(parameter):
            parameter.copy_(given[name])
        state_dict[f"{start}{name}"] = parameter


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    # of a parameter that ZeRO-3 has partitioned
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
