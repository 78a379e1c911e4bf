"""A result file of PEFT's format."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from integration.method_comparison.protocol import Trained

_SYSTEM = ("system", "release", "version", "machine", "processor")
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def result_of(
    trained: Trained,
    model: nn.Module,
    settings: Mapping[str, Any],
    adapter: Mapping[str, Any],
    experiment_name: str,
    created_at: str,
    total_time: float,
    file_size: int,
) -> dict[str, Any]:
    """What PEFT's comparison writes for a run that ended well; what is not known here is None."""
    on_gpu = torch.cuda.is_available()
    trainable, total = model.get_nb_trainable_parameters()
    packages = {}
    for name in _PACKAGES:
        packages[f"{name}-version"], packages[f"{name}-commit-hash"] = _version(name), None
    options = {name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()}
    unknown = {"sha": None, "created_at": None}
    return {
        "run_info": {
            "created_at": created_at,
            "total_time": total_time,
            "experiment_name": experiment_name,
            "peft_branch": None,
            "peft_worktree_is_dirty": None,
            "train_config": dict(settings),
            "peft_config": options,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(np.mean(trained.memory)),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() if on_gpu else 0,
            "accelerator_memory_reserved_99th": int(np.percentile(trained.memory, 99)),
            "train_time": trained.train_time,
            "file_size": file_size,
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": "success",
            "metrics": trained.metrics,
        },
        "meta_info": {
            "model_info": unknown,
            "dataset_info": {"metamath": unknown, "gsm8k": unknown},
            "package_info": packages,
            "system_info": {
                **{
                    name: getattr(platform, name)() for name in ("system", "release", "version", "machine", "processor")
                },
                "accelerator": torch.cuda.get_device_name(0) if on_gpu else None,
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
