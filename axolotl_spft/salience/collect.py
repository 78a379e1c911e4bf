"""Gathers the dense gradients of frozen weights while the model trains on a sample, one matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.gradient.saved_hooks import save
from axolotl_spft.salience.adders import SquaresAdder, adder_of, adder_of_experts, embedding_of
from axolotl_spft.salience.examples import Tokens
from axolotl_spft.salience.metrics.statistics import GRADIENT, INPUT_SQUARES
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.sparse_layer import SparseLayer

_ONE_PROCESS = Ranks()
# an expert that is a module of its own, or has some
_EXPERT = re.compile(r"\bexperts?\.\d+(\.|$)")


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


def fits(entries: int, device: torch.device, memory_gib: float | None = None) -> bool:
    """Whether ``memory_gib`` of a GPU, or half of its free memory, holds ``entries`` float32 accumulators.

    Of a host's memory there is no limit.
    """
    if device.type != "cuda":
        return True
    room = torch.cuda.mem_get_info(device)[0] // 2 if memory_gib is None else memory_gib * 2**30
    return 4 * entries <= room


def place_of(entries: int, device: torch.device, memory_gib: float | None = None) -> torch.device:
    """Where ``entries`` float32 accumulators of layers on ``device`` are kept: there if they fit, else on the host."""
    return device if fits(entries, device, memory_gib) else torch.device("cpu")


def experts_of(names: Iterable[str]) -> list[str]:
    """The layers that are modules of an expert, which not every batch reaches."""
    return [name for name in names if _EXPERT.search(name)]


def should_share_rows(
    layers: Mapping[str, nn.Module], ranks: Ranks, accumulators: int = 1, memory_gib: float | None = None
) -> bool:
    """Whether each rank should accumulate its own rows only, by the memory of this one.

    Whole accumulators on the host would be as many copies there as it has ranks, and each backward pass would move all
    gradients to it.

    Args:
        accumulators: for each weight.
        memory_gib: as of `fits`.
    """
    # a rank that routes nothing to an expert would not take part in sending its gradient
    if ranks.world == 1 or experts_of(layers):
        return False
    entries = accumulators * sum(layer.out_features * layer.in_features for layer in layers.values())
    return not all(fits(entries, device, memory_gib) for device in devices_of(layers))


@contextmanager
def gathered_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], ranks: Ranks = _ONE_PROCESS, sharded: bool = False
) -> Iterator[dict[str, Tensor]]:
    """`gathered_sums` of the gradient alone: yields name -> accumulator."""
    with gathered_sums(model, layers, (GRADIENT,), Tokens({}), ranks, sharded) as sums:
        yield sums[GRADIENT]


@contextmanager
def gathered_sums(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Collection[str],
    tokens: Tokens,
    ranks: Ranks = _ONE_PROCESS,
    sharded: bool = False,
    memory_gib: float | None = None,
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Within the block, every backward pass adds to the accumulators of each layer, with x its input and y its output.

    ``gradient``: dW = dY^T X, and of an embedding the sum of dY over the tokens of each row; of tied modules the sum of
    both. ``squared_gradient``: the sum over examples of (dY_e^T X_e)^2 with an example's own rows
    of dY and X. ``input_squares``: the sum of x_j^2 over the tokens that are no padding, of layers that multiply; where
    these alone are needed, every forward pass adds to them.

    No weight is made to require a gradient, so quantized ones take part too. Alive at a time are the accumulators and
    one layer's dense gradient, of which a sharded pass makes one rank's rows at a time.

    Args:
        model: owner of the layers; its input embeddings' output is made to require a gradient, as gradient
            checkpointing with re-entrance needs.
        layers: linear layers by name, with ``in_features`` and ``out_features``.
        needs: which of the three are gathered.
        tokens: of the batch that runs; its owner writes each batch's into it.
        ranks: the processes that share the sample.
        sharded: whether a rank accumulates its own rows only. Every backward pass then sends gradients, and all ranks
            must run the same layers; otherwise nothing is sent before `reduce_to_shards`.
        memory_gib: of accumulators on a GPU, by default half of what is free there; more are kept on the host.

    Yields:
        need -> name -> accumulator, float32: (out_features, in_features), or this rank's rows of it; of
        ``input_squares`` (in_features).
    """
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    rows_of = {
        name: ranks.rows(layer.out_features) if sharded else slice(0, layer.out_features)
        for name, layer in layers.items()
    }
    matrices = [need for need in needs if need != INPUT_SQUARES]
    entries = sum((rows.stop - rows.start) * layers[name].in_features for name, rows in rows_of.items())
    # before any is made, which leaves less free memory for the next
    placed = {device: place_of(entries * len(matrices), device, memory_gib) for device in devices_of(layers)}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            rows, device = rows_of[name], device_of(layer)
            # what experts that are one parameter multiply is seen by their weight's gradient alone
            of_experts = isinstance(layer, ExpertMatrix)
            adders: dict[nn.Module, list] = {module: [] for module in (layer, *getattr(layer, "readers", ()))}
            squares = None
            for need in needs:
                if need == INPUT_SQUARES and (of_experts or embedding_of(layer) is not None):
                    continue
                shape = (layer.in_features,) if need == INPUT_SQUARES else (rows.stop - rows.start, layer.in_features)
                total = torch.zeros(shape, dtype=torch.float32, device=placed[device] if need in matrices else device)
                sums[need][name] = total
                if need == INPUT_SQUARES:
                    squares = SquaresAdder(total, tokens)
                    continue
                shard = (layer.out_features, ranks) if sharded else None
                if of_experts:
                    adder = adder_of_experts(total, ranks if sharded else None)
                    hooks.callback(layer.watch_gradient(adder, all_at_once=sharded))
                    continue
                for module, own in adders.items():
                    own.append(adder_of(need, name, module, total, tokens, shard))
            for module, own in adders.items() if not of_experts else ():
                hook = _gathering_hook(own, squares) if matrices else _input_hook(squares)
                hooks.callback(module.register_forward_hook(hook).remove)
        if INPUT_SQUARES in needs:
            hooks.callback(_read_calls(model, tokens).remove)
        if matrices:
            _let_inputs_take_part(model, hooks)
        yield sums


@contextmanager
def probed_outputs(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the outputs of these layers take part in every backward pass, though nothing is gathered."""
    with ExitStack() as hooks:
        for layer in layers:
            for module in (layer, *getattr(layer, "readers", ())):
                hooks.callback(module.register_forward_hook(_gathering_hook([])).remove)
        yield


@contextmanager
def reached_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Within the block every backward pass adds the names of the layers whose weight gets a gradient of more than 0s.

    Yields:
        The names so far.
    """
    reached: set[str] = set()

    def noting(name: str) -> Callable[[Tensor, Tensor], None]:
        def note(grad_y: Tensor, x: Tensor) -> None:
            # of an embedding x are tokens, of which each has a row
            if name not in reached and grad_y.any() and (x.any() or not x.is_floating_point()):
                reached.add(name)

        return note

    def noting_gradient(name: str) -> Callable[[Tensor, int], None]:
        return lambda gradient, _: reached.add(name) if name not in reached and gradient.any() else None

    with ExitStack() as hooks:
        for name, layer in layers.items():
            if isinstance(layer, ExpertMatrix):
                hooks.callback(layer.watch_gradient(noting_gradient(name)))
                continue
            for module in (layer, *getattr(layer, "readers", ())):
                hooks.callback(module.register_forward_hook(_gathering_hook([noting(name)])).remove)
        _let_inputs_take_part(model, hooks)
        yield reached


def reduce_to_shards(sums: dict[str, Tensor], ranks: Ranks) -> None:
    """Replace each rank's own accumulators by its rows of their sum over the ranks, layer by layer."""
    if ranks.world > 1:
        for name in sums:
            total = ranks.sum_(sums[name])
            sums[name] = total[ranks.rows(total.shape[0])].clone()


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes."""
    return layer.weight_device if isinstance(layer, SparseLayer) else layer.weight.device


def devices_of(layers: Mapping[str, nn.Module]) -> set[torch.device]:
    """Where the layers compute."""
    return {device_of(layer) for layer in layers.values()}


def _input_hook(squares: SquaresAdder | None):
    def forward_hook(_, args: tuple, y: Tensor) -> None:
        if squares is not None and squares.tokens.is_running:
            squares.add(args[0].to(y.dtype), squares.tokens.counted(args[0]))

    return forward_hook


def _gathering_hook(adders: Sequence[Callable[[Tensor, Tensor], None]], squares: SquaresAdder | None = None):
    def forward_hook(_, args: tuple, y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # now: until the backward pass the model may have been called with another batch
        counted = None if squares is None else squares.tokens.counted(args[0])
        kept = save(args[0].detach())

        def gather(grad_y: Tensor) -> None:
            with torch.no_grad():
                x = kept()
                inputs = x.to(grad_y.dtype) if x.is_floating_point() else x
                for add in adders:
                    add(grad_y, inputs)
                if squares is not None:
                    squares.add(inputs, counted)

        probed = _probed(y)
        probed.register_hook(gather)
        return None if probed is y else probed

    return forward_hook


def _read_calls(model: nn.Module, tokens: Tokens) -> RemovableHandle:
    """Tell ``tokens`` which padding each call of the model has: the losses of TRL's trainers make their own batches."""

    def read(_, args: tuple, options: Mapping[str, Any]) -> None:
        tokens.read_call(options.get("attention_mask"))

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.register_forward_pre_hook(read, with_kwargs=True)


def _let_inputs_take_part(model: nn.Module, hooks: ExitStack) -> None:
    embeddings = _input_embeddings(model)
    if embeddings is not None:
        hooks.callback(embeddings.register_forward_hook(_require_grad).remove)


def _require_grad(_, args: tuple, output: Tensor) -> Tensor:
    return _probed(output) if torch.is_grad_enabled() else output


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
