"""Those keys of Axolotl that have two names, of which a configuration that Axolotl has not read yet may have either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the name that a configuration which Axolotl has read has: the other one, which counts where a file has both
TWO_NAMES = {
    "overrides_of_model_config": "model_config",
    "overrides_of_model_kwargs": "model_kwargs",
    "revision_of_model": "model_revision",
}


def of_two_names(cfg: Mapping[str, Any], key: str) -> Any:
    """The value of a key of `TWO_NAMES`, under whichever of its names ``cfg`` has it; None where it has neither."""
    found = cfg.get(TWO_NAMES[key])
    return cfg.get(key) if found is None else found


def revision_of(cfg: Mapping[str, Any]) -> str | None:
    """The branch, tag or commit of the hub that the run's base model is of; None for the main branch."""
    return of_two_names(cfg, "revision_of_model") or None
