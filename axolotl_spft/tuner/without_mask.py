"""Training an adapter that has no mask trains nothing: the first forward pass that is about to says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from axolotl_spft.errors import SpftError

if TYPE_CHECKING:
    from axolotl_spft.tuner.sparse_layer import SparseLayer

HOW_TO_SELECT = "call select_mask(model, batches) first, or give the trainer an SpftCallback"


_choosing = False


@contextmanager
def choosing_a_mask() -> Iterator[None]:
    """Within the block models run without a mask in train mode: the pass that chooses one does.

    It freezes all parameters, but a trainer's loss may choose adapters, as DPO's does, which makes them trained again.
    """
    global _choosing
    before, _choosing = _choosing, True
    try:
        yield
    finally:
        _choosing = before


def is_choosing() -> bool:
    """Whether a pass runs that chooses a mask."""
    return _choosing


def refuse_training_without_mask(module: nn.Module, *_: Any) -> None:
    """A forward pre-hook of a model with sparse layers.

    A forward pass trains when the model is in train mode, gradients are on, and the active adapter is enabled, not
    merged and not frozen. Whatever else is trained, modules of ``modules_to_save`` say, is no excuse. Evaluation, a
    pass without gradients and the salience pass run an empty adapter as the base model.

    Raises:
        SpftError: an adapter that is about to be trained has no values in any layer.
    """
    if _trains(module):
        # by what sparse layers hold: their class asks here itself
        _refuse(layer for layer in module.modules() if "spft_values" in layer._modules)


def refuse_layer_without_mask(layer: SparseLayer) -> None:
    """The same from within a layer without entries, to which a call past the model's own forward pass may have led.

    The other layers of its model have to be known, since one that the mask leaves empty is right.

    Raises:
        SpftError: as `refuse_training_without_mask`.
    """
    # its values are a buffer where the mask was chosen and leaves it empty
    if torch.compiler.is_compiling() or not layer.spft_values._parameters or not _trains(layer):
        return
    writer = None if layer._writer is None else layer._writer()
    if writer is not None:
        _refuse(writer.layers)


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not _choosing


def _refuse(layers: Iterable[SparseLayer]) -> None:
    waiting: set[str] = set()
    filled: set[str] = set()
    for layer in layers:
        if layer.disable_adapters or layer.merged:
            return
        active = set(layer.active_adapters)
        filled.update(layer._filled_active_adapters())
        # by the mask: values that ZeRO-3 has partitioned have no entries of their own
        if active <= filled:
            return
        waiting.update(
            name for name in active - filled if name in layer.spft_values and layer.spft_values[name].requires_grad
        )
    for name in sorted(waiting - filled):
        raise SpftError(f"adapter `{name}` has no mask: {HOW_TO_SELECT}")
