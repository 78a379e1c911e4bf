"""Salience-aware sparse fine-tuning of large language models, as a PEFT method and an Axolotl plugin.

Public names are imported on first use, so that importing the package loads neither torch nor CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DynamicMask": "axolotl_spft.dynamic",
    "SparseAdamW": "axolotl_spft.optim",
    "SpftArgs": "axolotl_spft.plugin",
    "SpftCallback": "axolotl_spft.trainer",
    "SpftConfig": "axolotl_spft.tuner",
    "SpftError": "axolotl_spft.errors",
    "SpftModel": "axolotl_spft.tuner",
    "SpftPlugin": "axolotl_spft.plugin",
    "select_mask": "axolotl_spft.salience",
    "step_unit": "axolotl_spft.tuner",
}

__all__ = [
    "DynamicMask",
    "SparseAdamW",
    "SpftArgs",
    "SpftCallback",
    "SpftConfig",
    "SpftError",
    "SpftModel",
    "SpftPlugin",
    "select_mask",
    "step_unit",
]

if TYPE_CHECKING:
    from axolotl_spft.dynamic import DynamicMask
    from axolotl_spft.errors import SpftError
    from axolotl_spft.optim import SparseAdamW
    from axolotl_spft.plugin import SpftArgs, SpftPlugin
    from axolotl_spft.salience import select_mask
    from axolotl_spft.trainer import SpftCallback
    from axolotl_spft.tuner import SpftConfig, SpftModel, step_unit


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
