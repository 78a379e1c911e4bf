"""`SpftConfig`: the options of sparse fine-tuning, their defaults and their rules.

This is the only place where defaults live; the YAML block of the Axolotl plugin has the same fields.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from axolotl_spft.errors import SpftConfigError
from axolotl_spft.files import check_safetensors
from axolotl_spft.metrics import METRICS, is_salience, nearest_metric
from axolotl_spft.peft_type import SPFT

SCOPES = ("layer", "global", "row")
BUDGETS = ("density", "num_values", "match_lora_rank")
DEFAULT_DENSITY = 0.005


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SpftConfig(PeftConfig):
    """Options of salience-aware sparse fine-tuning (Liu et al., ACL 2025, arXiv 2412.13488).

    Every targeted weight W (out_features, in_features) stays frozen; trained are ``values`` at fixed positions, the
    entries of a sparse S in y = x (W + S)^T + b. How many there are is set by exactly one of ``density``,
    ``num_values`` and ``match_lora_rank``; without any of them the density is 0.005.

    Raises:
        SpftConfigError: one or several options break a rule; all are reported together.
    """

    density: float | None = _option(None, "Share of the targeted weights that is trained, in (0, 1].")
    num_values: int | None = _option(None, "How many values are trained over all targeted weights.")
    match_lora_rank: int | None = _option(None, "Train as many values as a LoRA of this rank on the same modules.")
    target_modules: list[str] | str | None = _option(
        "all-linear", "Modules to adapt: 'all-linear', a list of names, or a regular expression."
    )
    exclude_modules: list[str] | str | None = _option(None, "Modules to leave alone: names or a regular expression.")
    layers_to_transform: list[int] | int | None = _option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the module list that holds the layers.")
    modules_to_save: list[str] | None = _option(None, "Further modules that are trained and saved whole.")
    salience: str = _option(
        "gradient", f"Score of a weight's importance: one of {', '.join(METRICS)}, or package.module:function."
    )
    lift_rank: int = _option(
        128, "Rank of the approximation that salience 'lift' reads; at most half the smaller side."
    )
    scope: str = _option(
        "layer", "Where scores compete: inside each matrix (layer), over all (global), in each output row (row)."
    )
    samples: int = _option(128, "Training examples that the salience pass reads.")
    seed: int | None = _option(None, "Seed of random choices; the run's seed under Axolotl, else 0.")
    mask_path: str | None = _option(None, "A saved mask: used when the file exists, else computed and saved there.")
    init_weights: bool = _option(
        True, "True: empty until select_mask. False: random positions and values at once (for generic PEFT tests)."
    )
    nnz: int | None = _option(None, "Recorded: how many values the adapter holds.")
    base_shapes: str | None = _option(None, "Recorded: fingerprint of the targeted modules' names and shapes.")
    mask_source: dict | None = _option(None, "Recorded: salience, scope, samples read and seed that made the mask.")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SPFT
        if not any(getattr(self, name) is not None for name in BUDGETS):
            self.density = DEFAULT_DENSITY
        if self.target_modules is None:
            self.target_modules = "all-linear"
        problems = check_options({name: getattr(self, name) for name in option_names()})
        if problems:
            raise SpftConfigError(problems)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        weights = folder / "adapter_model.safetensors"
        # PEFT reads the weights only after it has changed the model: look at the file before that
        if weights.is_file():
            check_safetensors(weights)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


RECORDED = ("nnz", "base_shapes", "mask_source")


def option_names() -> tuple[str, ...]:
    """Names of the options that users set, in the order of the class."""
    inherited = {f.name for f in fields(PeftConfig)}
    return tuple(f.name for f in fields(SpftConfig) if f.name not in inherited and f.name not in RECORDED)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, (list, tuple, set)) and bool(value) and all(isinstance(v, str) and v for v in value)


# name: (holds, what the rule says)
_RULES = {
    "density": (lambda v: _is_number(v) and 0 < v <= 1, "must be a number in (0, 1]"),
    "num_values": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "match_lora_rank": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "target_modules": (_is_names, "must be 'all-linear', a list of module names or a regular expression"),
    "exclude_modules": (_is_names, "must be a list of module names or a regular expression"),
    "layers_to_transform": (
        lambda v: _is_int(v) or (isinstance(v, (list, tuple)) and all(_is_int(i) for i in v)),
        "must be a layer index or a list of them",
    ),
    "layers_pattern": (_is_names, "must be a name or a list of names"),
    "modules_to_save": (
        lambda v: _is_names(v) and not isinstance(v, str),
        "must be a list of module names",
    ),
    "salience": (is_salience, f"must be one of {', '.join(METRICS)}, or your own package.module:function"),
    "lift_rank": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "scope": (lambda v: v in SCOPES, f"must be one of {', '.join(SCOPES)}"),
    "samples": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "seed": (lambda v: _is_int(v) and 0 <= v < 2**63, "must be a whole number of at least 0"),
    "mask_path": (
        lambda v: isinstance(v, str) and bool(v) and not Path(v).expanduser().is_dir(),
        "must be the path of a file, not of a folder",
    ),
    "init_weights": (lambda v: isinstance(v, bool), "must be true or false"),
}
_OPTIONAL = ("density", "num_values", "match_lora_rank", "exclude_modules", "layers_to_transform", "layers_pattern",
             "modules_to_save", "seed", "mask_path")  # fmt: skip


def _remedy(name: str, value: Any) -> str:
    """What to write for a number in another form: as text, which YAML takes 5e-3 for, or a whole one with a point."""
    if name == "salience":
        return nearest_metric(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    if number.is_integer() and name != "density":
        number = int(number)
    if isinstance(value, bool) or not _RULES[name][0](number):
        return ""
    return f" ({'YAML reads this as text: ' if isinstance(value, str) else ''}write {number})"


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Every problem of ``options`` as one sentence each: the key, its value, the rule and what to write instead."""
    problems = []
    for name, value in options.items():
        if name not in _RULES:
            near = difflib.get_close_matches(str(name), _RULES, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            problems.append(f"unknown key `{name}`: {hint}the keys are {', '.join(_RULES)}")
            continue
        if value is None and name in _OPTIONAL:
            continue
        holds, rule = _RULES[name]
        try:
            kept = holds(value)
        except TypeError:
            kept = False
        if not kept:
            problems.append(f"`{name}: {value}` {rule}{_remedy(name, value)}")
    targets = options.get("target_modules")
    if isinstance(targets, str) and targets.lower() != "all-linear":
        problems += [
            f"`{name}: {options[name]}` has no effect on `target_modules: {targets}`, a regular expression of whole "
            "names: write the layers into it, or list names"
            for name in ("layers_to_transform", "layers_pattern")
            if options.get(name)
        ]
    elif options.get("layers_pattern") and options.get("layers_to_transform") is None:
        problems.append(
            f"`layers_pattern: {options['layers_pattern']}` needs `layers_to_transform`: add the layers' indices"
        )
    for name in ("target_modules", "exclude_modules"):
        if isinstance(options.get(name), str):
            try:
                re.compile(options[name])
            except re.error as error:
                problems.append(
                    f"`{name}: {options[name]}` is not a regular expression ({error}): correct it, or list names"
                )
    budgets = [f"`{name}: {options[name]}`" for name in BUDGETS if options.get(name) is not None]
    if len(budgets) > 1:
        problems.append(f"{' and '.join(budgets)} each set the number of trained values: keep exactly one")
    return problems
