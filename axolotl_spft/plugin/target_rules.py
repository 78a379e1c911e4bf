"""What an Axolotl configuration trains that its engine or its kind of training cannot have, before the model loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# of Axolotl's kinds of training, those that ask the base model, without the adapter, what to compare with
_COMPARING = ("dpo", "ipo", "kto")


def problems_of_targets(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Every problem of what ``cfg`` trains, one sentence each.

    Args:
        cfg: the Axolotl configuration.
        options: its block ``spft``, each key of which keeps its own rule.
    """
    problems = []
    if options.get("bias") == "all" and cfg.get("rl") in _COMPARING and not cfg.get("precompute_ref_log_probs"):
        problems.append(
            f"`bias: all` trains the base model's own biases, and `rl: {cfg['rl']}` compares with that base, which "
            "would change as they do: leave `bias` out, or set `precompute_ref_log_probs: true`"
        )
    return problems
