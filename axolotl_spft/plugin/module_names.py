"""The module names that the ``spft:`` block lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from axolotl_spft.errors import SpftConfigError
from axolotl_spft.tuner.expert_targets import problem_of_parameter
from axolotl_spft.tuner.targets import problem_of_fused_experts

# key: what comes before a name in the name of a module that it matches, by PEFT's rules
_BEFORE = {"target_modules": ".", "modules_to_save": ""}


def check_module_names(options: Mapping[str, Any], model: nn.Module, allowed: Sequence[str] = ()) -> None:
    """Check that every name in a list is that of a module.

    PEFT passes over a name that matches nothing as long as another one matches.

    Args:
        allowed: names in ``modules_to_save`` that may be no module's.

    Raises:
        SpftConfigError: with all names that match nothing.
    """
    modules = [f".{name}" for name, _ in model.named_modules()]
    problems = []
    for key, before in _BEFORE.items():
        names = options.get(key)
        if names is None or isinstance(names, str):
            continue
        problems += [
            (key == "target_modules" and problem_of_fused_experts(name, model))
            or f"`{key}: {name}` matches no module of the {type(model).__name__}: correct the name, or leave it out"
            for name in names
            if not any(module.endswith(before + name) for module in modules)
            and not (key == "modules_to_save" and name in allowed)
        ]
    problems += filter(None, (problem_of_parameter(name, model) for name in options.get("target_parameters") or ()))
    if problems:
        raise SpftConfigError(problems)
