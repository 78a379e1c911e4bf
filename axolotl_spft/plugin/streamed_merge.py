"""What an Axolotl configuration says about the merge of its adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import yaml
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.model import ModelOutputConfig

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, read_json_object
from axolotl_spft.checkpoint.base import check_unquantized
from axolotl_spft.checkpoint.companions import CONFIG
from axolotl_spft.checkpoint.revision import OtherCommitError, find_base
from axolotl_spft.checkpoint.shards import Shards, find_checkpoint
from axolotl_spft.checkpoint.trained_base import recorded_base
from axolotl_spft.errors import SpftFileError
from axolotl_spft.plugin.args import ADAPTER
from axolotl_spft.plugin.key_names import revision_of
from axolotl_spft.plugin.key_types import problems_of_kinds
from axolotl_spft.plugin.quantization import make_exceptions, request_quantization, run_dtype
from axolotl_spft.plugin.salience_rules import asked_quantization, config_of_base
from axolotl_spft.tuner.trained_on import DTYPES, SETTINGS, bits_of

LOG = get_logger(__name__)


def merge_arguments(
    cfg: Mapping[str, Any], source: str, adapter: str | None = None, base: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The arguments of `axolotl_spft.checkpoint.merge.merge` for the adapter that a run has trained.

    Args:
        cfg: an Axolotl configuration, as its file has it.
        source: how to name it in an error.
        adapter: the adapter's folder, where it is not to be found by the configuration.
        base: the unquantized base model, where it is not to be the one that ``cfg`` names.

    Raises:
        SpftFileError: it is that of no sparse fine-tuning, does not say the base model, or a value is of a wrong kind.
    """
    if cfg.get("adapter") != ADAPTER:
        raise SpftFileError(
            f"{source}: `adapter: {cfg.get('adapter')}` must be {ADAPTER}: name a run with that adapter"
        )
    wrong = problems_of_kinds(cfg)
    if wrong:
        raise SpftFileError(f"{source}: {'; '.join(wrong)}")
    if not cfg.get("base_model"):
        raise SpftFileError(f"{source}: `base_model` is missing: name the model that was trained")
    folder = adapter or _adapter_of(cfg)
    saved = config_of_base(cfg).get("quantization_config")
    saved = saved if isinstance(saved, Mapping) and saved.get("quant_method") == "bitsandbytes" else None
    # what an adapter repairs is told by the unquantized weights
    unquantized = base or (saved and (cfg.get("spft") or {}).get("repair_from"))
    return {
        "adapter_folder": folder,
        "output": Path(cfg.get("output_dir") or folder) / "merged",
        "base": unquantized or cfg["base_model"],
        **_base_of(cfg, source, folder, saved, base),
        "revision": None if unquantized else revision_of(cfg),
        "trust_remote_code": bool(cfg.get("trust_remote_code")),
    }


def _adapter_of(cfg: Mapping[str, Any]) -> str:
    """The folder of the adapter that the run has trained; before it has, of the one that it goes on from."""
    own = cfg.get("output_dir") or ModelOutputConfig.model_fields["output_dir"].default
    first = cfg.get("lora_model_dir")
    return own if _is_finished(own) else first or own


def _is_finished(folder: str) -> bool:
    # the configuration alone is there as soon as training begins
    return all(Path(folder, name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _base_of(
    cfg: Mapping[str, Any], source: str, folder: str, saved: Mapping[str, Any] | None, base: str | os.PathLike | None
) -> dict[str, Any]:
    """What the configuration tells of the base in training, if the adapter does not tell it itself.

    Args:
        saved: how the base was quantized when it was saved.
        base: the unquantized base model, where it is not to be the one that ``cfg`` names.
    """
    recorded = recorded_base(folder) if Path(folder, WEIGHTS_FILE).is_file() else {}
    if recorded:
        # which may have been changed since
        if bits_of(saved or asked_quantization(cfg) or cfg) != bits_of(recorded["quantization"]):
            LOG.warning("%s quantizes otherwise than %s records of its training, which counts", source, folder)
        return {}
    # transformers loads a model that was saved quantized as it is, whatever is asked for
    quantization = _quantization(cfg, base) if saved is None else {key: saved[key] for key in saved if key in SETTINGS}
    # quantized bases are trained on GPUs that compute in bfloat16, wherever they are merged
    dtype = DTYPES[run_dtype(cfg, computes_bf16=True)]
    return {"quantization": quantization, "dtype": dtype if quantization else None}


def _quantization(cfg: Mapping[str, Any], base: str | os.PathLike | None) -> dict[str, Any]:
    """The settings that the plugin asks transformers for; see `request_quantization`."""
    asked = dict(cfg)
    request_quantization(asked)
    settings = (asked.get("model_kwargs") or {}).get("quantization_config")
    if not settings:
        return {}
    settings = dict(settings)
    folder = find_checkpoint(base or cfg["base_model"], None if base else revision_of(cfg), weights=False)
    model_config = read_json_object(folder / CONFIG, "copy it again")
    make_exceptions(
        SimpleNamespace(
            overrides_of_model_kwargs={"quantization_config": settings},
            model_config_type=model_config.get("model_type"),
            bnb_config_kwargs=cfg.get("bnb_config_kwargs"),
            deepspeed=cfg.get("deepspeed"),
        )
    )
    settings.pop("quant_method", None)
    return settings


def merge_instead(cfg: Any) -> bool:
    """Do the merge of ``axolotl merge-lora`` as ``axolotl spft merge`` does, before any model loads.

    Returns:
        False where the base can only be merged in memory: files of another format, or a base that was saved quantized.

    Raises:
        SpftFileError: as `merge_arguments` says, or it is not told which of two adapters is to be merged.
    """
    from axolotl_spft.checkpoint.merge import merge
    from axolotl_spft.checkpoint.report import describe_merge

    # Axolotl has put both off for its merge in memory, and remembers one
    put_off = {"load_in_4bit": bool(cfg.get("_original_load_in_4bit"))}
    put_off["load_in_8bit"] = not put_off["load_in_4bit"] and _file_of(cfg).get("load_in_8bit") is True
    arguments = merge_arguments({**cfg, **put_off}, "the configuration", adapter=_named_for_the_merge(cfg))
    cfg.lora_model_dir = arguments["adapter_folder"]
    try:
        base = find_base(arguments["adapter_folder"], arguments["base"], arguments["revision"])
        check_unquantized(Shards(base.folder))
    except OtherCommitError:
        raise
    except SpftFileError as error:
        LOG.warning("Merging in memory: %s", error)
        return False
    # as Axolotl's own merge does, whose earlier ones have no mark
    LOG.info("%s", describe_merge(merge(**arguments, overwrite=True)))
    return True


def _named_for_the_merge(cfg: Any) -> str | None:
    """The adapter's folder that this merge, and not the run, names; None where there is none."""
    first, own = _file_of(cfg).get("lora_model_dir"), cfg.output_dir
    if cfg.lora_model_dir != first:
        # an option, or put there by Axolotl because the file names none
        return cfg.lora_model_dir
    call = click.get_current_context(silent=True)
    if call is not None and "lora_model_dir" in call.params:
        return call.params["lora_model_dir"]
    if first and own and Path(first).resolve() != Path(own).resolve() and _is_finished(first) and _is_finished(own):
        raise SpftFileError(
            f"{first} (`lora_model_dir`) and {own} (`output_dir`) both hold an adapter, and only the command line of "
            f"`axolotl merge-lora` tells which is meant: run `axolotl spft merge {first}` or `axolotl spft merge {own}`"
        )
    return None


def _file_of(cfg: Any) -> Mapping[str, Any]:
    """What the configuration's file says, as far as it can still be read."""
    try:
        found = yaml.safe_load(Path(cfg.axolotl_config_path).read_text(encoding="utf-8"))
    except (TypeError, OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}
