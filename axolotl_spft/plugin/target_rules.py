"""What an Axolotl configuration trains that its engine or its kind of training cannot have, before the model loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoConfig

from axolotl_spft.plugin.key_names import of_two_names
from axolotl_spft.plugin.salience_rules import config_of_base

# of Axolotl's kinds of training, those that ask the base model, without the adapter, what to compare with
_COMPARING = ("dpo", "ipo", "kto")
# as architectures name them, with what comes before
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("model.embed_tokens", "model.language_model.embed_tokens", "gpt_neox.embed_in",
               "transformer.word_embeddings", "transformer.wte")  # fmt: skip


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
    if (loss := fused_loss_of(cfg)) and (head := _targeted_head(cfg, options)):
        problems.append(
            f"`{loss}` multiplies by the head's weight without calling the head, so that the values of "
            f"`target_modules: {head}` would miss the head's part of their gradient: leave one of the two out"
        )
    return problems


def fused_loss_of(cfg: Mapping[str, Any]) -> str | None:
    """The key or plugin whose training loss reads the head's weight past the head, if there is one.

    Preference trainers give the model no labels, so that its own loss is not asked.
    """
    if any(cfg.get(key) for key in ("inference", "merge_lora")):
        return None
    rl, trl = cfg.get("rl"), cfg.get("trl") or {}
    if not rl and cfg.get("liger_fused_linear_cross_entropy"):
        return "liger_fused_linear_cross_entropy: true"
    if not rl and has_cut_cross_entropy(cfg):
        return "plugins: CutCrossEntropyPlugin"
    if rl and cfg.get("dpo_use_liger_kernel"):
        return "dpo_use_liger_kernel: true"
    if rl and isinstance(trl, Mapping) and trl.get("use_liger_loss"):
        return "trl.use_liger_loss: true"
    return None


def has_cut_cross_entropy(cfg: Mapping[str, Any]) -> bool:
    """Whether the plugin of that loss is on, which it is unless its key says otherwise."""
    plugins = map(str, cfg.get("plugins") or ())
    return cfg.get("cut_cross_entropy") is not False and any("CutCrossEntropy" in plugin for plugin in plugins)


def _targeted_head(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """The name or pattern in ``target_modules`` that takes the head, or an embedding that is tied to it."""
    targets = options.get("target_modules") or ()
    # of each group a model has one, which is the one that is left out if any is
    groups = [_HEADS, _EMBEDDINGS] if _ties(cfg) else [_HEADS]
    names = [name for group in groups if not any(_is_left_out(name, options) for name in group) for name in group]
    if isinstance(targets, str):
        return targets if any(_takes(targets, name) for name in names) else None
    return next((target for target in targets if any(_takes([target], name) for name in names)), None)


def _is_left_out(name: str, options: Mapping[str, Any]) -> bool:
    return any(_takes(options.get(key) or (), name) for key in ("exclude_modules", "modules_to_save"))


def _takes(wanted: str | Iterable[str], name: str) -> bool:
    """As PEFT matches: a pattern takes whole names, an entry of a list their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{entry}") for entry in wanted)


def _ties(cfg: Mapping[str, Any]) -> bool:
    found = {**config_of_base(cfg), **(of_two_names(cfg, "overrides_of_model_config") or {})}
    try:
        # with the defaults of the kind of model, which its file leaves out
        config = AutoConfig.for_model(**found)
    except Exception:
        # whatever is wrong with it is told when the model loads
        return bool(found.get("tie_word_embeddings"))
    return bool(getattr(config, "tie_word_embeddings", False))
