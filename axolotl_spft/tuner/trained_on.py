"""What the values of an adapter are added to in training: the dtype of the base, its quantization and its commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from axolotl_spft.tuner.state import spft_layers

# of a quantization by bitsandbytes, what bears on the weights
SETTINGS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
            "bnb_4bit_quant_storage", "llm_int8_skip_modules")  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32,
                                                                 torch.float64)}  # fmt: skip


def trained_on(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What an adapter's values are added to in a model.

    Returns:
        ``dtype``: the name of the one that the targeted weights have, or had before they were quantized;
        ``quantization``: those of `SETTINGS` that are set, of another method than bitsandbytes ``quant_method`` alone,
        None of a base that is not quantized; ``commit``: the one of the hub that was loaded, where that is known. Empty
        where the layers do not tell it.
    """
    layers = [layer for layer in spft_layers(model).values() if adapter_name in layer.spft_values]
    quantized = [layer for layer in layers if layer.quantization_backend is not None]
    config = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    if quantized and settings is None:
        return {}
    # of 8 bits a weight does not tell it
    dtypes = Counter(layer.loaded_dtype or getattr(config, "dtype", None) for layer in quantized or layers)
    dtype = next((each for each, _ in dtypes.most_common(1)), None)
    return base_of(dtype, _plain(settings), getattr(config, "_commit_hash", None))


def base_of(
    dtype: torch.dtype | None, quantization: Mapping[str, Any] | None = None, commit: str | None = None
) -> dict[str, Any]:
    """These as `trained_on` tells them; empty of a dtype that is none of `DTYPES`."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        return {}
    return {"dtype": name, "quantization": quantization} | ({"commit": commit} if commit else {})


def common(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several adapters were trained on, if that is the same for all but for the commit; else empty."""
    first, *others = ({"commit": None, **each} for each in found)
    same = {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}
    if first.keys() - same.keys() - {"commit"}:
        return {}
    return {key: value for key, value in same.items() if key != "commit" or value}


def is_possible(recorded: object) -> bool:
    """Whether this can be what `trained_on` has told."""
    if not isinstance(recorded, Mapping):
        return False
    return not recorded or (
        recorded.get("dtype") in DTYPES
        and isinstance(recorded.get("quantization"), (Mapping, type(None)))
        and isinstance(recorded.get("commit"), (str, type(None)))
    )


def bits_of(quantization: Mapping[str, Any] | None) -> int | None:
    """4 or 8, of settings with which the weights can be quantized again; else None."""
    quantization = quantization or {}
    return 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else None


def method_of(settings: Mapping[str, Any]) -> str:
    """The name of the method of a ``quantization_config``, such as ``gptq``."""
    method = settings.get("quant_method")
    return str(getattr(method, "value", method)).lower()


def _plain(settings: Any) -> dict[str, Any] | None:
    if settings is None:
        return None
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    method = method_of(settings)
    if method != "bitsandbytes":
        return {"quant_method": method}
    plain = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    return {key: dtype_name(value) if isinstance(value, torch.dtype) else value for key, value in plain.items()}


def dtype_name(dtype: torch.dtype | None) -> str:
    """As in `DTYPES`."""
    return str(dtype).removeprefix("torch.")
