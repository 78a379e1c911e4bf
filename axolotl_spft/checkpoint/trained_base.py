"""What of the base of an adapter's training is known: how it was quantized, and the dtype that it had before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import check_safetensors
from axolotl_spft.tuner.record import read_record
from axolotl_spft.tuner.trained_on import DTYPES, bits_of, dtype_name

# Axolotl's own, on the GPUs that train quantized bases
_ASSUMED = torch.bfloat16


class TrainedBase(NamedTuple):
    """The base that an adapter was trained on.

    Attributes:
        quantization: settings of the ``BitsAndBytesConfig`` that it had; empty where it had none.
        dtype: of its weights before they were quantized; None where that makes no difference.
        recorded: what the adapter's record says, empty where it says nothing.
        told_by: where these are from: ``record``, ``caller``, or ``nothing``, where no quantization is assumed.
        assumed_dtype: whether nothing tells the dtype.
    """

    quantization: Mapping[str, Any]
    dtype: torch.dtype | None
    recorded: Mapping[str, Any]
    told_by: str
    assumed_dtype: bool = False

    @property
    def unreadable(self) -> str | None:
        """The recorded method of a quantization that cannot be done again, such as GPTQ's."""
        quantization = self.recorded.get("quantization") or {}
        return None if self.told_by != "record" or bits_of(quantization) else quantization.get("quant_method")

    def summary(self) -> dict[str, Any]:
        """For a report in JSON."""
        return {
            "quantization": dict(self.quantization) or None,
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "recorded": dict(self.recorded) or None,
            "told_by": self.told_by,
            "assumed_dtype": self.assumed_dtype,
        }


def recorded_base(adapter_folder: str | os.PathLike) -> dict[str, Any]:
    """What a saved adapter records of the base that it was trained on; empty of older ones.

    Raises:
        SpftFileError: the adapter's file is missing or damaged.
    """
    path = Path(adapter_folder, WEIGHTS_FILE)
    check_safetensors(path)
    return read_record(path).get("trained_on", {})


def trained_base(
    adapter_folder: str | os.PathLike, quantization: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> TrainedBase:
    """The base that an adapter was trained on, by its record or as the caller has it.

    Args:
        quantization: settings of a ``BitsAndBytesConfig``, empty for none; by default those of the record. Where the
            record has more than these say, and nothing else, it counts.
        dtype: that the base was loaded in; by default that of the record, and bfloat16 where that says nothing.

    Raises:
        SpftFileError: the adapter's file is damaged, or there is a dtype of a base that was not quantized.
    """
    recorded = recorded_base(adapter_folder)
    own = recorded.get("quantization") or {}
    if recorded and (quantization is None or _agree(quantization, own)):
        base = TrainedBase(own if bits_of(own) else {}, DTYPES[recorded["dtype"]], recorded, "record")
    else:
        told_by = "nothing" if quantization is None else "caller"
        base = TrainedBase(quantization or {}, _ASSUMED, recorded, told_by, assumed_dtype=bool(quantization))
    if dtype is not None and not base.quantization:
        raise SpftFileError(
            f"`--dtype {dtype_name(dtype)}` tells what a base was before it was quantized, and "
            "nothing tells that it was: add `--quantization`, or leave it out"
        )
    if dtype is not None and (dtype != base.dtype or base.assumed_dtype):
        base = base._replace(dtype=dtype, told_by="caller", assumed_dtype=False)
    return base if base.quantization else base._replace(dtype=None)


def choose_onto(onto: str | None, trained: TrainedBase, repairs: bool, adapter_folder: str | os.PathLike) -> str:
    """``base`` or ``quantized``, which is the default where the base of the training was.

    Args:
        repairs: whether the adapter repairs a quantized base.

    Raises:
        SpftFileError: ``quantized``, and nothing tells how; or nothing tells what an adapter repairs.
    """
    if onto == "base" or trained.quantization:
        return onto or "quantized"
    if onto is None and (not repairs or trained.told_by == "record"):
        return "base"
    if trained.told_by == "record":
        method = trained.unreadable
        was = f"quantized by {method}, which cannot be done again here" if method else "not quantized"
        raise SpftFileError(
            f"`--onto {onto}`: {adapter_folder} records that its base was {was}: leave the option out, or say with "
            "`--quantization` how it was"
        )
    told = f"`--onto {onto}` needs to know how the base was quantized"
    if onto is None:
        told = f"{adapter_folder} repairs a quantized base, of which nothing here tells the settings"
    raise SpftFileError(
        f"{told}: name the run's configuration file instead of the adapter, or add `--quantization nf4`"
        + (", or `--onto base`" if onto is None else "")
    )


def _agree(told: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    return bool(told) == bool(recorded) and all(recorded.get(key) == value for key, value in told.items())
