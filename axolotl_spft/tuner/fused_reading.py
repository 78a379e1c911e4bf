"""torch's own encoder layer reads its linear layers' weights without calling them, where it evaluates in one kernel."""

from __future__ import annotations

from typing import Any

from torch import nn

from axolotl_spft.tuner.sparse_layer import SparseLayer

# attributes of a `torch.nn.TransformerEncoder`, whose padding is cut out for that kernel alone
_NESTED = ("use_nested_tensor", "enable_nested_tensor")
_BEFORE = "_nested_without_sparse_layers"


def stop_fused_reading(model: nn.Module) -> None:
    """Let every `torch.nn.TransformerEncoderLayer` call the sparse layers in it, which alone know what to multiply by.

    torch leaves its fused path where a module inside has a hook.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _sparse_layers(module):
            module.__dict__.setdefault(_BEFORE, {name: getattr(module, name) for name in _NESTED})
            module.__dict__.update(dict.fromkeys(_NESTED, False))
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in _sparse_layers(module):
                if _is_called not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_is_called)


def allow_fused_reading(model: nn.Module) -> None:
    """Give the encoders back as they were, of a model whose sparse layers are taken out."""
    for module in model.modules():
        module.__dict__.update(module.__dict__.pop(_BEFORE, {}))


def _sparse_layers(module: nn.Module) -> list[SparseLayer]:
    return [each for each in module.modules() if isinstance(each, SparseLayer)]


def _is_called(*_: Any) -> None:
    """Nothing: that it is there is what counts."""
