"""What of a run with ``reselect`` cannot work, by an Axolotl configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_spft.dynamic.dynamic_mask import metric_on_the_way
from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.salience_rules import stage_of
from axolotl_spft.reselect_rules import Reselect
from axolotl_spft.trainer.prepare import OPTIMIZERS
from axolotl_spft.trainer.reselection import problem_of_run


def problems_of_reselect(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Every problem of the re-selections that ``cfg`` asks for, one sentence each; none where it asks for none.

    Args:
        cfg: the Axolotl configuration.
        options: its block ``spft``, each key of which keeps its own rule.
    """
    if options.get("reselect") is None or cfg.get("inference") or cfg.get("merge_lora"):
        return []
    problems = []
    try:
        metric_on_the_way(options.get("salience") or "gradient")
    except SpftError as error:
        problems.append(str(error))
    # Axolotl's own default
    optimizer = str(cfg.get("optimizer") or "adamw_torch_fused")
    problem = problem_of_run(
        Reselect(**options["reselect"]),
        _micro_batches(cfg),
        cfg.get("torch_compile") is True,
        f"zero{stage_of(cfg)}",
        None if optimizer in OPTIMIZERS else optimizer,
    )
    return [*problems, problem] if problem else problems


def _micro_batches(cfg: Mapping[str, Any]) -> int:
    """Those of an optimizer step; Axolotl takes either key."""
    if cfg.get("gradient_accumulation_steps") or not cfg.get("batch_size"):
        return int(cfg.get("gradient_accumulation_steps") or 1)
    return int(cfg["batch_size"]) // int(cfg.get("micro_batch_size") or 1)
