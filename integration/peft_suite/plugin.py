"""A pytest plugin that runs PEFT's tests with `SpftConfig` wherever they are run with `ShiraConfig`.

`integration.peft_suite.run` loads it into pytest, in a checkout of PEFT. Of the tests it keeps those of the two
methods, and it writes how each of them went to the file that ``SPFT_SUITE_RECORD`` names.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import ShiraConfig

import axolotl_spft.tuner  # noqa: F401
from axolotl_spft import SpftConfig

METHODS = {"SHiRA": ShiraConfig, "SPFT": SpftConfig}
# options of SHiRA that a sparse adapter has not
_OF_SHIRA = ("r", "random_seed", "mask_type")
# of the tests that are parametrized without SHiRA: what to run in them
_BESIDE = {
    "test_quantization.py": {"target_modules": ["q_proj", "v_proj"], "density": 0.01, "init_weights": False},
}
# of those of batches with several adapters, by the names of the parameters: names of the case, and the modules of each
_ADAPTERS = {
    ("test_name", "config0", "config1"): (("SPFT", "lin0", "lin0"), ("SPFT of different layers", "lin0", "lin1")),
    ("test_name", "config"): (("SPFT", "lin0"),),
}
# others of them are about modules and combinations of LoRA's own
_OF_ANY_METHOD = ("_mlp", "_different_target_layers", "_length_mismatch_raises", "_training_mode_raises", "_disabled",
                  "_merged_raises", "_wrong_adapter_name_raises")  # fmt: skip
_records: dict[str, dict[str, str]] = {}


def counterpart(case: Any) -> Any | None:
    """The case of `SpftConfig` that corresponds to one of `ShiraConfig`; None for a case of another method.

    Both have a mask; SHiRA's values are 0 at first, and a new sparse adapter that has no mask trains nothing. So ours
    has a random mask and random values.
    """
    if case is ShiraConfig:
        return SpftConfig
    parts = case.values if hasattr(case, "marks") else case
    if not isinstance(parts, (tuple, list)) or ShiraConfig not in [part for part in parts if isinstance(part, type)]:
        return None
    new = [
        SpftConfig
        if part is ShiraConfig
        else options_of(part)
        if isinstance(part, dict)
        else part.replace("SHiRA", "SPFT").replace("shira", "spft")
        if isinstance(part, str)
        else part
        for part in parts
    ]
    return pytest.param(*new, marks=case.marks) if hasattr(case, "marks") else tuple(new)


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    """SHiRA's options as those of a sparse adapter of the same number of values."""
    kept = {name: value for name, value in options.items() if name not in _OF_SHIRA}
    budget = {"match_lora_rank": options["r"]} if "r" in options else {}
    return {**kept, **budget, "init_weights": False}


def add_cases(names: list[str], cases: list[Any], file: str, test: str) -> None:
    """Put our case behind each one of SHiRA, or into a list of methods or adapters that has none of them."""
    new = [counterpart(case) for case in cases]
    if not any(case is not None for case in new) and names == ["config_cls", "config_kwargs"] and file in _BESIDE:
        new = [(SpftConfig, _BESIDE[file])]
    for title, *modules in _ADAPTERS.get(tuple(names), ()) if test.endswith(_OF_ANY_METHOD) else ():
        configs = [SpftConfig(density=0.2, target_modules=[module], init_weights=False) for module in modules]
        new.append((title, *configs))
    cases.extend(case for case in new if case is not None)


def method_of(item: pytest.Item) -> str | None:
    """The method that a test is run with, of `METHODS`."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    for name, config in METHODS.items():
        if any(value is config or isinstance(value, config) for value in values):
            return name
    return None


def _stand_in_for_diffusers() -> None:
    """The common code of the tests imports it for pipelines of pictures, which no test here runs."""
    if find_spec("diffusers") is None:
        module = ModuleType("diffusers")
        module.__spec__ = ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


@contextmanager
def _from_the_cache(_: str) -> Iterator[None]:
    yield


def pytest_sessionstart(session: pytest.Session) -> None:
    _stand_in_for_diffusers()
    # PEFT's own goes online for the first use of each model
    import tests.testing_utils

    tests.testing_utils.hub_online_once = _from_the_cache


def pytest_collectstart(collector: pytest.Collector) -> None:
    # the lists of cases are shared by the tests of a file: each is extended once
    collector.session.__dict__.setdefault("_spft_extended", [])


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    extended = metafunc.definition.session.__dict__["_spft_extended"]
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, cases = mark.args[:2]
        if isinstance(cases, list) and not any(cases is other for other in extended):
            extended.append(cases)
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            add_cases(names, cases, metafunc.definition.path.name, metafunc.definition.name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = os.environ.get("SPFT_SUITE_METHODS", ",".join(METHODS)).split(",")
    kept = [item for item in items if method_of(item) in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    _records.update({item.nodeid: {"method": method_of(item)} for item in kept})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    record = _records.get(report.nodeid)
    if record is None or (report.when != "call" and report.passed) or record.get("outcome") == "failed":
        return
    record["outcome"] = report.outcome
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        if crash and said.split()[0] in ("AssertionError", "assert"):
            # which says little: the line that asserts it says more
            said = linecache.getline(crash.path, crash.lineno).strip() or said
        record["said"] = said[:300]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("SPFT_SUITE_RECORD")
    if path:
        Path(path).write_text(json.dumps(_records, indent=1), encoding="utf-8")
