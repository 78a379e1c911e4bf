"""What an Axolotl configuration trains that its engine or its kind of training cannot have, before the model loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils.other import EMBEDDING_LAYER_NAMES

from axolotl_spft.plugin.salience_rules import config_of, stage_of

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
    targets = options.get("target_modules")
    tied = [name for name in targets if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES] if _is_list(targets) else []
    if tied and stage_of(cfg) == 3 and _ties_embeddings(cfg):
        problems.append(
            f"`target_modules: {tied[0]}` is tied to another module of {cfg['base_model']}, and under ZeRO-3 the "
            "values of their one delta are not gathered for the second: use ZeRO-2 or DDP, or leave it out"
        )
    return problems


def _is_list(targets: Any) -> bool:
    return isinstance(targets, (list, tuple, set))


def _ties_embeddings(cfg: Mapping[str, Any]) -> bool:
    """Whether a config.json on this machine says so; where it is silent, the model's class decides when it loads."""
    config = config_of(str(cfg.get("base_model") or ""))
    changed = cfg.get("overrides_of_model_config") or {}
    text = config.get("text_config")
    parts = [changed, config, text if isinstance(text, Mapping) else {}]
    return next((part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part), False) is True
