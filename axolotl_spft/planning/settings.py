"""What of an Axolotl configuration decides about memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.planning.bits import base_bits
from axolotl_spft.plugin.args import ADAPTER, check_run
from axolotl_spft.plugin.deepspeed_json import read_deepspeed_json, zero_stage
from axolotl_spft.plugin.key_names import of_two_names, revision_of
from axolotl_spft.plugin.quantization import run_dtype
from axolotl_spft.plugin.salience_rules import asked_quantization, has_its_mask
from axolotl_spft.plugin.target_rules import has_cut_cross_entropy
from axolotl_spft.trainer.prepare import OPTIMIZERS
from axolotl_spft.tuner.trained_on import method_of

# keys with which the logits of a whole batch never exist
_FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
# kinds of preference training whose batch holds two answers to each prompt
_PAIRED = ("dpo", "ipo", "orpo", "simpo")


class Settings(NamedTuple):
    """Sizes and switches of a run.

    Attributes:
        base_model: the name or folder of the base model.
        revision: the branch, tag or commit that it is of, on the hub.
        overrides: what the run changes of its configuration.
        options: the block ``spft``.
        bits: of the base's linear weights: 16 (the run's dtype), 8 or 4.
        bits_are_fixed: whether the keys ``load_in_4bit`` and ``load_in_8bit`` change nothing about them.
        chooses_mask: whether a salience pass runs before training.
        trust_remote_code: whether code that the base model brings may run.
        remarks: sentences on what is not as in a run.
        dtype_bytes: of a number in the run's dtype.
        value_bytes: of a trained value in the forward pass of one process.
        engine: of `axolotl_spft.engine.kind.engine_of`.
        gpus: processes.
        rows: sequences of one forward and backward pass.
        sequence_len: tokens of each.
        accumulates: whether gradients live through several passes.
        checkpointing: whether each block is computed again in the backward pass.
        fused_loss: whether the logits are made a piece at a time.
        eager: whether attention keeps a score for each pair of tokens.
        state_bits: of the moments; None where the optimizer is not `SparseAdamW`.
        buckets: elements of DeepSpeed's buckets.
        prefetched: elements of the weights that ZeRO-3 gathers ahead.
        reused: elements within which ZeRO-3 keeps gathered weights that are used again.
        offload_optimizer, offload_base: whether they lie on the host.
    """

    base_model: str
    options: Mapping[str, Any]
    bits: int
    dtype_bytes: int
    value_bytes: int
    engine: str
    gpus: int
    rows: int
    sequence_len: int
    accumulates: bool
    checkpointing: bool
    fused_loss: bool
    eager: bool
    state_bits: int | None
    buckets: int
    prefetched: int
    reused: int
    offload_optimizer: bool
    offload_base: bool
    bits_are_fixed: bool = False
    chooses_mask: bool = True
    trust_remote_code: bool = False
    remarks: tuple[str, ...] = ()
    revision: str | None = None
    overrides: Mapping[str, Any] = {}


def read_settings(path: Path, gpus: int | None) -> Settings:
    """The settings of a configuration file.

    Args:
        gpus: how many; by default 8 with the key ``deepspeed``, else 1.

    Raises:
        SpftError: the file cannot be read, or is no configuration with ``adapter: spft``.
        SpftConfigError: what `axolotl train` would refuse about it, all together.
    """
    try:
        cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpftError(f"{path} cannot be read ({error}): name an Axolotl configuration") from error
    except yaml.YAMLError as error:
        raise SpftError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(cfg, dict) or cfg.get("adapter") != ADAPTER:
        raise SpftError(f"{path} has no `adapter: spft`: name the configuration of a sparse run")
    problems = check_run(cfg)
    if not cfg.get("base_model"):
        problems.append("`base_model` is not set: name the base model")
    if problems:
        raise SpftConfigError(problems)
    return settings_of(cfg, gpus)


def settings_of(cfg: Mapping[str, Any], gpus: int | None) -> Settings:
    """The settings of a configuration that `check_run` finds no problem in."""
    zero: Mapping[str, Any] = {}
    if cfg.get("deepspeed"):
        settings = read_deepspeed_json(cfg["deepspeed"])
        zero = (settings.get("zero_optimization") or {}) if zero_stage(settings) else {}
    gpus = gpus or (8 if cfg.get("deepspeed") else 1)
    engine = f"zero{zero['stage']}" if zero else "ddp" if gpus > 1 else "single"
    dtype_bytes = 4 if run_dtype(cfg, computes_bf16=True) == "float32" else 2
    keeps_dtype = cfg.get("peft_autocast_adapter_dtype") is False
    options = dict(cfg.get("spft") or {})
    paired = cfg.get("rl") in _PAIRED
    run = Settings(
        base_model=str(cfg["base_model"]),
        options=options,
        bits=4 if cfg.get("load_in_4bit") or cfg.get("gptq") else 8 if cfg.get("load_in_8bit") else 16,
        dtype_bytes=dtype_bytes,
        value_bytes=dtype_bytes if keeps_dtype else 4,
        engine=engine,
        gpus=gpus,
        rows=int(cfg.get("micro_batch_size") or 1) * (2 if paired else 1),
        sequence_len=int(cfg.get("sequence_len") or 512),
        accumulates=int(cfg.get("gradient_accumulation_steps") or 1) > 1,
        checkpointing=bool(cfg.get("gradient_checkpointing")),
        fused_loss=any(cfg.get(key) for key in _FUSED_LOSSES) or has_cut_cross_entropy(cfg),
        eager=(cfg.get("attn_implementation") or ("eager" if cfg.get("eager_attention") else "")) == "eager",
        state_bits=OPTIMIZERS.get(str(cfg.get("optimizer"))),
        prefetched=_elements(zero, "stage3_prefetch_bucket_size", 50_000_000) if engine == "zero3" else 0,
        reused=_elements(zero, "stage3_max_reuse_distance", 1_000_000_000) if engine == "zero3" else 0,
        buckets=(2 if zero.get("overlap_comm") else 1) * _elements(zero, "reduce_bucket_size", 500_000_000)
        if zero
        else 0,
        offload_optimizer=bool(zero.get("offload_optimizer")),
        offload_base=bool(zero.get("offload_param")),
        chooses_mask=not has_its_mask(cfg, options),
        trust_remote_code=bool(cfg.get("trust_remote_code")),
        revision=revision_of(cfg),
        overrides=of_two_names(cfg, "overrides_of_model_config") or {},
    )
    return quantized(run, asked_quantization(cfg))


def quantized(run: Settings, settings: Any) -> Settings:
    """The run on a base with these settings of a quantization, which the keys ``load_in_*bit`` do not change.

    Args:
        settings: ``quantization_config``, of the key ``model_kwargs`` or of the config.json of a base that was saved
            quantized, which is loaded as it is; None: there is none, and the run is as it was.
    """
    if settings is None:
        return run
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    bits, remarks = base_bits(settings), run.remarks
    if bits is None:
        told = f"How many bits the base has, quantized by {method_of(settings)}, is not known: planned are "
        remarks = (*remarks, f"{told}{8 * run.dtype_bytes}.")
    return run._replace(bits=bits or 16, bits_are_fixed=True, remarks=remarks)


def _elements(zero: Mapping[str, Any], key: str, default: int) -> int:
    # "auto" becomes known when the engine is made: transformers makes it the square of the hidden size
    found = zero.get(key, default)
    return int(found) if isinstance(found, (int, float)) else 0
