"""Refuses operands on the meta device: torch multiplies by one without an error, and returns uninitialised memory."""

from __future__ import annotations

from torch import Tensor

from axolotl_spft.errors import SpftError


def check_present(x: Tensor, **operands: Tensor | None) -> None:
    """Check the operands of an operation on ``x``, by the names that an error shall give them.

    Raises:
        SpftError: ``x`` has memory, and one of them has none.
    """
    for name, tensor in operands.items():
        if tensor is not None and tensor.is_meta and not x.is_meta:
            raise SpftError(
                f"`{name}` {tuple(tensor.shape)} lies on the meta device, which holds no numbers: load or initialize "
                "the model before it computes, and offload it by accelerate's hooks on the modules themselves "
                "(no `preload_module_classes`)"
            )
