"""SynFlow's pass: the flow through the network of absolute weights, without any data.

As in the code of Liu et al. (ACL 2025), of a transformer this is the model as it stands with these changes: every
parameter (weights, biases, norms) is replaced by its absolute value; activation functions, and with them the softmax of
attention and routers, are the identity; norms stay; the input is one token, whose embedding is all ones. R is the sum
of the logits. Dropout is left out, and everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import gathered_while_used
from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.salience.untouched import untouched_model, untouched_rng
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.offloading import is_offloaded

# the modules whose classes are functions of one number each
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def synaptic_flow(model: nn.Module, layers: Mapping[str, SpftLinear], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of dR/d|W| of each layer: (rows, in_features) float32.

    Raises:
        SpftError: the model is offloaded, or cannot be run on the embedding of one token, or R is not finite.
    """
    offloaded = [name for name, module in model.named_modules() if is_offloaded(module)]
    if offloaded:
        raise SpftError(
            "`salience: synflow` runs the model without the forward passes that accelerate brings offloaded weights in "
            f"for ({first_of(offloaded, ', ')}): use `salience: magnitude`, which reads no data either, or keep the "
            "model on a device"
        )
    flows: dict[str, Tensor] = {}
    embeddings = model.get_input_embeddings()
    width, device = embeddings.embedding_dim, embeddings.weight.device
    ones = torch.ones(1, 1, width, device=device, dtype=torch.float32)
    with (
        untouched_rng(),
        untouched_model(model),
        gathered_while_used(model),
        _absolute_layers(model, layers, flows, ranks),
        _Absolute(),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        try:
            output = model(inputs_embeds=ones.requires_grad_(), use_cache=False)
            total = (output.logits if hasattr(output, "logits") else output[0]).sum()
        except SpftError:
            raise
        except Exception as error:  # models differ in what they take
            raise SpftError(
                "`salience: synflow` runs the model on the embedding of one token, which this model does not take "
                f"({type(error).__name__}: {error}): use `salience: magnitude`, which reads no data either"
            ) from error
        if not torch.isfinite(total):
            raise SpftError(
                "`salience: synflow`: the network of absolute weights overflows float32: use another salience"
            )
        total.backward()
    missing = [name for name in layers if name not in flows]
    for name in missing:
        layer = layers[name]
        rows = ranks.rows(layer.out_features)
        flows[name] = torch.zeros(rows.stop - rows.start, layer.in_features, device=device, dtype=torch.float32)
    return {name: flows[name] for name in layers}


class _Absolute(TorchFunctionMode):
    """Every parameter that torch reads is its absolute value in float32; softmax is the identity, attention linear."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _IDENTITIES:
            return args[0] if args else kwargs.get("input")
        if function is F.scaled_dot_product_attention:
            return _linear_attention(*args, **kwargs)
        if any(isinstance(each, nn.Parameter) for each in (*args, *kwargs.values())):
            args = [_absolute(each) for each in args]
            kwargs = {name: _absolute(each) for name, each in kwargs.items()}
        return function(*args, **kwargs)


_IDENTITIES = {
    F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, F.dropout, torch.dropout,
    F.silu, F.gelu, F.relu, torch.relu, F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh,
    F.softplus, F.relu6, F.leaky_relu, F.elu, F.mish,
}  # fmt: skip


def _absolute(value: Any) -> Any:
    if isinstance(value, nn.Parameter) and value.is_floating_point():
        with torch._C.DisableTorchFunction():
            return value.detach().abs().to(torch.float32)
    return value


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    if kwargs.get("enable_gqa"):
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return (query @ key.transpose(-2, -1) * scale) @ value


class _Linear(torch.autograd.Function):
    """y = x |W|^T + |b|; backward reads W again, and gives dY^T x to ``flow``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, flow: Callable | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.flow = weight, flow
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (x,) = ctx.saved_tensors
        if ctx.flow is not None:
            ctx.flow(grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1]))
        return grad_y @ ctx.weight(), None, None, None


@contextmanager
def _absolute_layers(
    model: nn.Module, layers: Mapping[str, SpftLinear], flows: dict[str, Tensor], ranks: Ranks
) -> Iterator[None]:
    """Replaces the forward pass of linear layers that are targeted or quantized, and of activation functions."""

    def flow_of(name: str, layer: SpftLinear) -> Callable:
        rows = ranks.rows(layer.out_features)

        def add(grad_rows: Tensor, x_rows: Tensor) -> None:
            part = grad_rows[:, rows].t() @ x_rows
            flows[name] = flows[name] + part if name in flows else part

        return add

    adapted = {id(layer): flow_of(name, layer) for name, layer in layers.items()}
    inside = {id(layer.get_base_layer()) for layer in layers.values()}
    with ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # recomputed in backward, where the mode may not be on; put back with the rest of the module's state
                module.gradient_checkpointing = False
            if id(module) in inside:
                continue
            if id(module) in adapted:
                stack.enter_context(_forward(module, _linear_of(module, module.read_weight, adapted[id(module)])))
            elif type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.MultiheadAttention):
                stack.enter_context(_forward(module, lambda x, *_, **__: x))
            elif _is_quantized(module) or isinstance(module, nn.Linear):
                # plain ones too: DeepSpeed puts a function of its own in the place of torch's
                stack.enter_context(_forward(module, _linear_of(module, _reader(module), None)))
        yield


def _reader(module: nn.Module) -> Callable[[], Tensor]:
    backend = resolve_quantization_backend(module) if _is_quantized(module) else None
    return lambda: module.weight if backend is None else backend.get_base_weight(module)


def _is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        not isinstance(module, SpftLinear)
        and hasattr(module, "in_features")
        and isinstance(weight, Tensor)
        and not weight.is_floating_point()
    )


def _linear_of(module: nn.Module, read_weight: Callable[[], Tensor], flow: Callable | None) -> Callable:
    base_layer = module.get_base_layer() if isinstance(module, SpftLinear) else module

    def weight() -> Tensor:
        with torch._C.DisableTorchFunction():
            return read_weight().detach().to(torch.float32).abs()

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        bias = _absolute(getattr(base_layer, "bias", None))
        return _Linear.apply(x, weight, bias, flow)

    return forward


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Puts a forward pass in the place of the module's own."""
    held = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if held is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = held
