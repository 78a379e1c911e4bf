"""Quantized bases: Axolotl quantizes by itself only for its LoRA adapters, so the plugin asks for it and checks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.key_names import of_two_names


def request_quantization(cfg: MutableMapping[str, Any]) -> None:
    """Make ``load_in_4bit`` / ``load_in_8bit`` of a raw Axolotl configuration take effect.

    The settings are those of Axolotl's QLoRA: nf4, double quantization; computed and stored in the run's dtype. What
    differs by the kind of model, which is not known yet, is left to `make_exceptions`.
    """
    wanted = "4bit" if cfg.get("load_in_4bit") else "8bit" if cfg.get("load_in_8bit") else None
    model_kwargs = dict(of_two_names(cfg, "overrides_of_model_kwargs") or {})
    if wanted is None or "quantization_config" in model_kwargs:
        return
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", f"load_in_{wanted}": True}
    if wanted == "4bit":
        settings |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": run_dtype(cfg),
            # ZeRO-3 gathers parameters together with the dtype of the first: all must have the same
            "bnb_4bit_quant_storage": run_dtype(cfg),
            **(cfg.get("bnb_config_kwargs") or {}),
        }
    cfg["model_kwargs"] = {**model_kwargs, "quantization_config": settings}


def make_exceptions(cfg: Any) -> None:
    """Quantize the kinds of model that Axolotl makes exceptions for as its LoRA and QLoRA do.

    Args:
        cfg: Axolotl's configuration, once it knows the model's kind, before the model loads.
    """
    settings = (cfg.overrides_of_model_kwargs or {}).get("quantization_config")
    if not settings or settings.get("quant_method") != "bitsandbytes":
        return
    kind, own = cfg.model_config_type, cfg.bnb_config_kwargs or {}
    # projections that fused kernels read by themselves
    spared = {"falcon_h1": ["out_proj"], "jamba": ["mamba"] if settings.get("load_in_8bit") else None}.get(kind)
    if spared:
        settings.setdefault("llm_int8_skip_modules", spared)
    if (
        kind in ("jamba", "qwen2_moe", "nemotron_h")
        and settings.get("load_in_4bit")
        and not cfg.deepspeed
        and "bnb_4bit_quant_storage" not in own
    ):
        settings["bnb_4bit_quant_storage"] = "float32"


def run_dtype(cfg: Mapping[str, Any], computes_bf16: bool | None = None) -> str:
    """The dtype that Axolotl will choose from the same raw keys.

    Args:
        computes_bf16: whether the GPUs of the run compute in bfloat16; by default those of this machine are asked.
    """
    from transformers.utils import is_torch_bf16_gpu_available

    bf16, fp16, float16 = cfg.get("bf16", "auto"), cfg.get("fp16"), cfg.get("float16")
    if bf16 == "auto":
        bf16 = not fp16 and (is_torch_bf16_gpu_available() if computes_bf16 is None else computes_bf16)
        fp16 = fp16 or (not bf16 and fp16 is None and not float16)
    if bf16 or cfg.get("bfloat16"):
        return "bfloat16"
    return "float16" if fp16 or float16 or cfg.get("load_in_8bit") else "float32"


def check_quantized(model: nn.Module, load_in_4bit: bool, load_in_8bit: bool) -> None:
    """Check that the loaded model is what the configuration asked for.

    Raises:
        SpftError: it is not quantized although it should be.
    """
    for wanted, key, name in (
        (load_in_4bit, "load_in_4bit", "Linear4bit"),
        (load_in_8bit, "load_in_8bit", "Linear8bitLt"),
    ):
        if not wanted:
            continue
        import bitsandbytes as bnb

        if not any(isinstance(module, getattr(bnb.nn, name)) for module in model.modules()):
            raise SpftError(
                f"`{key}: true`, but the loaded model has no bitsandbytes {name} layer: "
                "check `base_model` and `model_kwargs`, or leave the key out"
            )


def prepare_for_training(model: nn.Module, dtype: torch.dtype | None, gradient_checkpointing: dict | None) -> nn.Module:
    """k-bit preparation as on Axolotl's QLoRA path: PEFT's, then norms and embeddings back in the run's dtype.

    Args:
        gradient_checkpointing: its keyword arguments, or None to leave it off.
    """
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing is not None,
        gradient_checkpointing_kwargs=gradient_checkpointing,
    )
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if dtype is not None and ("norm" in name or module in embeddings):
            module.to(dtype)
    return model
