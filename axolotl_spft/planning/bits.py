"""In how many bits the linear weights of a base lie, by the settings of its quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_spft.tuner.trained_on import bits_of, method_of

# of methods whose settings do not tell it
_BITS = {"awq": 4, "gptq": 4, "mxfp4": 4, "eetq": 8, "fp8": 8, "fbgemm_fp8": 8}


def base_bits(settings: Mapping[str, Any]) -> int | None:
    """The least of 4, 8 and 16 that holds an entry; None where nothing tells it."""
    if (bits := bits_of(settings)) is not None:
        return bits
    told = [settings.get(key) for key in ("bits", "w_bit", "nbits")]
    found = next((bits for bits in told if isinstance(bits, int)), _BITS.get(method_of(settings)))
    return None if found is None else next((bits for bits in (4, 8) if found <= bits), 16)
