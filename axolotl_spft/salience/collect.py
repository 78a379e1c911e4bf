"""Gathers the dense gradients of frozen weights while the model trains on a sample, one matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.backends.products import matmul
from axolotl_spft.tuner.offloading import execution_device

_ONE_PROCESS = Ranks()
# an expert that is a module of its own
_EXPERT = re.compile(r"\bexperts?\.\d+\.")


class _Probe(torch.autograd.Function):
    """The identity, with a gradient: makes the output of frozen layers that nothing trained precedes take part."""

    @staticmethod
    def forward(ctx, y: Tensor, probe: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        return grad_y, None


def _probed(y: Tensor) -> Tensor:
    """``y``, or where it needs no gradient a copy that does and may be changed in place, as a leaf may not."""
    return y if y.requires_grad else _Probe.apply(y, torch.zeros((), device=y.device, requires_grad=True))


def fits(entries: int, device: torch.device) -> bool:
    """Whether half of a GPU's free memory holds ``entries`` float32 accumulators; of a host's there is no limit."""
    return device.type != "cuda" or 4 * entries <= torch.cuda.mem_get_info(device)[0] // 2


def should_share_rows(layers: Mapping[str, nn.Module], ranks: Ranks) -> bool:
    """Whether each rank should accumulate its own rows only, by the memory of this one.

    Whole accumulators on the host would be as many copies there as it has ranks, and each backward pass would move all
    gradients to it.
    """
    # a rank that routes nothing to an expert would not take part in sending its gradient
    if ranks.world == 1 or any(_EXPERT.search(name) for name in layers):
        return False
    entries = sum(layer.out_features * layer.in_features for layer in layers.values())
    return not all(fits(entries, device) for device in _devices_of(layers))


@contextmanager
def gathered_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], ranks: Ranks = _ONE_PROCESS, sharded: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Within the block, every backward pass adds dW = dY^T X of each layer to its accumulator.

    No weight is made to require a gradient, so quantized ones take part too. Alive at a time are the accumulators and
    one layer's dense gradient, of which a sharded pass makes one rank's rows at a time.

    Args:
        model: owner of the layers; its input embeddings' output is made to require a gradient, as gradient
            checkpointing with re-entrance needs.
        layers: linear layers by name, with ``in_features`` and ``out_features``.
        ranks: the processes that share the sample.
        sharded: whether a rank accumulates its own rows only. Every backward pass then sends gradients, and all ranks
            must run the same layers; otherwise nothing is sent before `reduce_to_shards`.

    Yields:
        name -> accumulator, float32: (out_features, in_features), or this rank's rows of it.
    """
    sums: dict[str, Tensor] = {}
    shapes = {}
    for name, layer in layers.items():
        rows = ranks.rows(layer.out_features) if sharded else slice(0, layer.out_features)
        shapes[name] = rows.stop - rows.start, layer.in_features
    entries = sum(n_rows * in_features for n_rows, in_features in shapes.values())
    # before any is made, which leaves less free memory for the next
    placed = {device: device if fits(entries, device) else torch.device("cpu") for device in _devices_of(layers)}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            sums[name] = torch.zeros(shapes[name], dtype=torch.float32, device=placed[_device_of(layer)])
            add = _adder_to_shard(sums[name], layer.out_features, ranks) if sharded else _adder(sums[name])
            hooks.callback(layer.register_forward_hook(_gathering_hook(add)).remove)
        embeddings = _input_embeddings(model)
        if embeddings is not None:
            hooks.callback(embeddings.register_forward_hook(_require_grad).remove)
        yield sums


def reduce_to_shards(sums: dict[str, Tensor], ranks: Ranks) -> None:
    """Replace each rank's own accumulators by its rows of their sum over the ranks, layer by layer."""
    if ranks.world > 1:
        for name in sums:
            total = ranks.sum_(sums[name])
            sums[name] = total[ranks.rows(total.shape[0])].clone()


def _device_of(layer: nn.Module) -> torch.device:
    linear = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return execution_device(linear) or linear.weight.device


def _devices_of(layers: Mapping[str, nn.Module]) -> set[torch.device]:
    return {_device_of(layer) for layer in layers.values()}


def _adder(total: Tensor) -> Callable[[Tensor, Tensor], None]:
    def add(grad_rows: Tensor, x_rows: Tensor) -> None:
        total.add_(matmul(grad_rows.t(), x_rows).to(total.device))

    return add


def _adder_to_shard(total: Tensor, out_features: int, ranks: Ranks) -> Callable[[Tensor, Tensor], None]:
    def add(grad_rows: Tensor, x_rows: Tensor) -> None:
        for rank in range(ranks.world):
            part = matmul(grad_rows[:, ranks.rows(out_features, rank)].t(), x_rows).to(torch.float32)
            ranks.sum_to_(part, rank)
            if rank == ranks.rank:
                total.add_(part.to(total.device))

    return add


def _gathering_hook(add: Callable[[Tensor, Tensor], None]):
    def forward_hook(_, args: tuple, y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0].detach()

        def gather(grad_y: Tensor) -> None:
            with torch.no_grad():
                add(grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad_y.dtype))

        probed = _probed(y)
        probed.register_hook(gather)
        return None if probed is y else probed

    return forward_hook


def _require_grad(_, args: tuple, output: Tensor) -> Tensor:
    return _probed(output) if torch.is_grad_enabled() else output


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
