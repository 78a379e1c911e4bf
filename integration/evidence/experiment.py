"""An experiment is a small JSON file; this makes the list of its runs.

    {"question": "a", "title": "...", "conclusion": "...",
     "base": "smollm2-135m-instruct", "bits": 16, "task": "gsm8k",
     "steps": 80, "batch": 8, "length": 160, "seeds": [0, 1, 2],
     "methods": [{"label": "LoRA r4", "method": "lora", "options": {"r": 4}, "learning_rates": [0.001, 0.003]}]}

``base``, ``bits``, ``task``, ``steps`` and ``seeds`` may stand in an entry of ``methods`` too, for that entry alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.evidence.methods import METHODS
from integration.evidence.tasks import TASKS

_DEFAULTS = {
    "bits": 16,
    "steps": 80,
    "batch": 8,
    "length": 160,
    "judged": 128,
    "warmup": 0.05,
    "samples": 64,
    "dtype": "bfloat16",
}
_OF_A_RUN = ("base", "task", *_DEFAULTS)
_OF_A_METHOD = {"label", "method", "options", "learning_rates", "seeds", *_OF_A_RUN}
_OF_AN_EXPERIMENT = {"question", "title", "conclusion", "methods", "seeds", *_OF_A_RUN}


def read_experiment(path: Path) -> dict[str, Any]:
    """The file's contents, checked.

    Raises:
        SystemExit: with every problem, a line each.
    """
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    problems = [f"unknown key `{key}`" for key in sorted(set(experiment) - _OF_AN_EXPERIMENT)]
    problems += [f"`{key}` is missing" for key in ("question", "title", "methods") if key not in experiment]
    for number, entry in enumerate(experiment.get("methods", [])):
        where = f"methods[{number}]"
        problems += [f"{where}: unknown key `{key}`" for key in sorted(set(entry) - _OF_A_METHOD)]
        if entry.get("method") not in METHODS:
            problems.append(f"{where}: `method: {entry.get('method')}` must be one of {', '.join(METHODS)}")
        merged = {**experiment, **entry}
        if merged.get("task") not in TASKS:
            problems.append(f"{where}: `task: {merged.get('task')}` must be one of {', '.join(TASKS)}")
        if not merged.get("base"):
            problems.append(f"{where}: `base` is missing")
        if entry.get("method") != "none" and not entry.get("learning_rates"):
            problems.append(f"{where}: `learning_rates` is missing")
        if not entry.get("label"):
            problems.append(f"{where}: `label` is missing")
    if problems:
        raise SystemExit("\n".join(f"{path}: {problem}" for problem in problems))
    return experiment


def runs_of(experiment: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dict a run: what it is, and nothing of what comes of it."""
    runs = []
    # seeds outermost: after a third of the time every row has its first figure
    for seed in _seeds(experiment):
        for entry in experiment["methods"]:
            if seed not in entry.get("seeds", experiment.get("seeds", [0])):
                continue
            for rate in entry.get("learning_rates") or [0.0]:
                merged = {**_DEFAULTS, **experiment, **entry}
                run = {key: merged[key] for key in _OF_A_RUN}
                run |= {
                    "method": entry["method"],
                    "options": entry.get("options", {}),
                    "learning_rate": rate,
                    "seed": seed,
                }
                runs.append(run)
    return runs


def _seeds(experiment: dict[str, Any]) -> list[int]:
    each = [entry.get("seeds", experiment.get("seeds", [0])) for entry in experiment["methods"]]
    return sorted({seed for seeds in each for seed in seeds})


def key_of(run: dict[str, Any]) -> str:
    """What tells a run from all others: equal for equal dicts, whatever their order."""
    return json.dumps({name: run[name] for name in sorted(run) if name not in ("result", "made")}, sort_keys=True)
