"""The rules of the options of `axolotl_spft.config.SpftConfig`, each broken one told in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_spft.errors import did_you_mean
from axolotl_spft.metrics import METRICS, is_salience
from axolotl_spft.reselect_rules import EXAMPLE, problems_beside, problems_of_block

SCOPES = ("layer", "global", "row")
PATTERNS = ("element", "block")
BUDGETS = ("density", "num_values", "match_lora_rank")
DEFAULT_DENSITY = 0.005


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, (list, tuple, set)) and bool(value) and all(isinstance(v, str) and v for v in value)


def _is_density(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


# name: (holds, what the rule says)
_RULES = {
    "density": (_is_density, "must be a number in (0, 1]"),
    "num_values": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "match_lora_rank": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "density_pattern": (
        lambda v: (
            isinstance(v, Mapping)
            and all(isinstance(key, str) and key and _is_density(density) for key, density in v.items())
        ),
        "must be a block of `regular expression: density in (0, 1]` (to train nothing of a module name it in "
        "`exclude_modules`)",
    ),
    "min_density": (_is_density, "must be a number in (0, 1]"),
    "max_density": (_is_density, "must be a number in (0, 1]"),
    "target_modules": (_is_names, "must be 'all-linear', a list of module names or a regular expression"),
    "target_parameters": (
        lambda v: _is_names(v) and not isinstance(v, str),
        "must be a list of the names of parameters of three dimensions, such as [experts.gate_up_proj]",
    ),
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
    "bias": (lambda v: v in ("none", "all"), "must be none or all"),
    "salience": (is_salience, f"must be one of {', '.join(METRICS)}, or your own package.module:function"),
    "lift_rank": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "scope": (lambda v: v in SCOPES, f"must be one of {', '.join(SCOPES)}"),
    "pattern": (lambda v: v in PATTERNS, f"must be one of {', '.join(PATTERNS)}"),
    "block_size": (
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(_is_int(side) and side >= 1 for side in v),
        "must be [rows, columns], whole numbers of at least 1",
    ),
    "samples": (lambda v: _is_int(v) and v >= 1, "must be a whole number of at least 1"),
    "score_after": (lambda v: _is_int(v) and v >= 0, "must be a whole number of at least 0"),
    "salience_memory_gib": (lambda v: _is_number(v) and v > 0, "must be a number above 0"),
    "repair": (lambda v: _is_number(v) and 0 <= v <= 1, "must be a number from 0 (off) to 1"),
    "repair_from": (lambda v: isinstance(v, str) and bool(v), "must be a folder, or the name of a model of the hub"),
    "seed": (lambda v: _is_int(v) and 0 <= v < 2**63, "must be a whole number of at least 0"),
    "mask_path": (
        lambda v: isinstance(v, str) and bool(v) and not Path(v).expanduser().is_dir(),
        "must be the path of a file, not of a folder",
    ),
    "reselect": (lambda v: isinstance(v, Mapping), f"must be a block of keys such as {EXAMPLE}"),
    "relative_step": (lambda v: isinstance(v, bool), "must be true or false"),
    "init_weights": (lambda v: isinstance(v, bool), "must be true or false"),
}
_OPTIONAL = ("density", "num_values", "match_lora_rank", "density_pattern", "min_density", "max_density",
             "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
             "salience_memory_gib", "repair_from", "seed", "mask_path", "reselect")  # fmt: skip


def _remedy(name: str, value: Any) -> str:
    """What to write for a number in another form: as text, which YAML takes 5e-3 for, or a whole one with a point."""
    if name == "salience":
        return did_you_mean(value, METRICS)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    if number.is_integer() and "density" not in name and name != "repair":
        number = int(number)
    if isinstance(value, bool) or not _RULES[name][0](number):
        return ""
    return f" ({'YAML reads this as text: ' if isinstance(value, str) else ''}write {number})"


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Every problem of ``options`` as one sentence each: the key, its value, the rule and what to write instead."""
    problems = []
    for name, value in options.items():
        if name not in _RULES:
            problems.append(f"unknown key `{name}`{did_you_mean(name, _RULES)}: the keys are {', '.join(_RULES)}")
            continue
        if value is None and name in _OPTIONAL:
            continue
        if name == "target_modules" and value in ([], set()) and options.get("target_parameters"):
            # these alone
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
    if isinstance(options.get("reselect"), Mapping):
        problems += problems_of_block(options["reselect"])
    budgets = [f"`{name}: {options[name]}`" for name in BUDGETS if options.get(name) is not None]
    if len(budgets) > 1:
        problems.append(f"{' and '.join(budgets)} each set the number of trained values: keep exactly one")
    # what breaks its own rule is not compared with others
    if problems:
        return problems
    of_reselect = problems_beside(options) if options.get("reselect") is not None else []
    return _problems_of_shares(options) + _problems_of_repair(options) + of_reselect


def _problems_of_shares(options: Mapping[str, Any]) -> list[str]:
    """Combinations of options about what is chosen in each matrix, each valid by itself, that have no meaning."""
    problems = []
    scope, pattern = options.get("scope", "layer"), options.get("pattern", "element")
    for key in options.get("density_pattern") or ():
        try:
            re.compile(key)
        except re.error as error:
            problems.append(f"`density_pattern` has `{key}`, which is not a regular expression ({error}): correct it")
    lowest, highest = options.get("min_density"), options.get("max_density")
    if scope != "global":
        problems += [
            f"`{name}: {options[name]}` bounds what a matrix gets under one top-k over all, but `scope: {scope}` fixes "
            "the share of each: write `scope: global`, or leave it out"
            for name in ("min_density", "max_density")
            if options.get(name) is not None
        ]
    density = options.get("density")
    if density is None and all(options.get(name) is None for name in BUDGETS):
        density = DEFAULT_DENSITY
    if lowest is not None and highest is not None and lowest > highest:
        problems.append(f"`min_density: {lowest}` is above `max_density: {highest}`: exchange them")
    elif density is not None:
        for name, bound, broken in (
            ("min_density", lowest, lowest is not None and lowest > density),
            ("max_density", highest, highest is not None and highest < density),
        ):
            if broken:
                problems.append(
                    f"`{name}: {bound}` cannot be kept with `density: {density}`: the bounds must lie around it"
                )
    if pattern == "block" and scope == "row":
        problems.append(
            "`pattern: block` chooses blocks of several rows, so rows cannot each have a share of their own: write "
            "`scope: layer` or `scope: global`, or `pattern: element`"
        )
    if pattern == "block" and options.get("init_weights") is False:
        problems.append("`init_weights: False` draws single entries: write `pattern: element`")
    return problems


def _problems_of_repair(options: Mapping[str, Any]) -> list[str]:
    """Combinations with the option ``repair``, each valid by itself, that have no meaning."""
    repair, source = options.get("repair") or 0, options.get("repair_from")
    if not repair:
        rule = f"`repair_from: {source}` is read with `repair` above 0 alone: set that too, or leave it out"
        return [rule] if source else []
    problems = []
    if options.get("pattern") == "block":
        problems.append(
            f"`repair: {repair}` spends values on single entries, and `pattern: block` trains whole blocks: write "
            "`pattern: element`, or leave `repair` out"
        )
    if options.get("init_weights") is False:
        problems.append(
            f"`repair: {repair}` has no meaning with `init_weights: False`, which draws values: leave it out"
        )
    return problems
