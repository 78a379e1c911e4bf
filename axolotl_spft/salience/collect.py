"""Gathers the dense gradients of frozen weights while the model trains on a sample, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class _Probe(torch.autograd.Function):
    """The identity, with a gradient: makes the output of frozen layers that nothing trained precedes take part."""

    @staticmethod
    def forward(ctx, y: Tensor, probe: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        return grad_y, None


def accumulator_device(layers: Mapping[str, nn.Module], device: torch.device) -> torch.device:
    """The layers' own device while half of its free memory holds the accumulators, else the host."""
    if device.type != "cuda":
        return device
    needed_bytes = 4 * sum(layer.out_features * layer.in_features for layer in layers.values())
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return device if needed_bytes <= free_bytes // 2 else torch.device("cpu")


@contextmanager
def gathered_gradients(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, every backward pass adds dW = dY^T X of each layer to its accumulator.

    No weight is made to require a gradient, so quantized ones take part too. Alive at a time are the accumulators and
    one layer's dense gradient.

    Args:
        model: owner of the layers; its input embeddings' output is made to require a gradient, as gradient
            checkpointing with re-entrance needs.
        layers: linear layers by name, with ``in_features`` and ``out_features``.

    Yields:
        name -> accumulator (out_features, in_features), float32.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            device = layer.get_base_layer().weight.device if hasattr(layer, "get_base_layer") else layer.weight.device
            sums[name] = torch.zeros(layer.out_features, layer.in_features, device=accumulator_device(layers, device))
            hooks.callback(layer.register_forward_hook(_gathering_hook(sums[name])).remove)
        embeddings = _input_embeddings(model)
        if embeddings is not None:
            hooks.callback(embeddings.register_forward_hook(_require_grad).remove)
        yield sums


def _gathering_hook(total: Tensor):
    def forward_hook(_, args: tuple, y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0].detach()

        def add(grad_y: Tensor) -> None:
            with torch.no_grad():
                grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
                gradient = grad_rows.t() @ x.reshape(-1, x.shape[-1]).to(grad_y.dtype)
                total.add_(gradient.to(total.device))

        probed = y if y.requires_grad else _Probe.apply(y, torch.zeros((), device=y.device, requires_grad=True))
        probed.register_hook(add)
        return None if probed is y else probed

    return forward_hook


def _require_grad(_, args: tuple, output: Tensor) -> None:
    if torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_(True)


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
