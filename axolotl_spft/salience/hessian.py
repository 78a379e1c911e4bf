"""H g: the Hessian of the sample's loss in the targeted weights, times a direction, layer by layer.

With t a number and every layer's weight W + t V, the gradient of the loss is dY^T x, and (H V) = d/dt (dY^T x) at 0. No
weight is changed or made to require a gradient, so quantized and partitioned ones take part: the layer's output becomes
y + t x V^T. Either autograd differentiates twice, which every step of the model must allow, or a central difference of
t = +-step is taken, of 8-bit layers with their dequantized weights. With partitioned weights no rank holds more than
one layer of V and of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import is_partitioned
from axolotl_spft.ops.backends.products import matmul
from axolotl_spft.salience.adders import gradient_adder
from axolotl_spft.salience.collect import gathered_gradients, reduce_to_shards
from axolotl_spft.salience.untouched import untouched_rng
from axolotl_spft.tuner.layer import SpftLinear

BY_AUTOGRAD, BY_DIFFERENCE = "double backward", "central difference"
LossOf = Callable[[nn.Module], Tensor]


def hessian_products(
    model: nn.Module,
    layers: Mapping[str, SpftLinear],
    directions: Mapping[str, Tensor],
    losses: Iterable[tuple[LossOf, int]],
    ranks: Ranks,
) -> tuple[dict[str, Tensor], str]:
    """This rank's rows of H V, summed over the batches of all ranks; and by which of the two ways.

    Args:
        directions: this rank's rows of V, (rows, in_features) float32 for each layer.
        losses: for each batch the function that gives its loss; the second number is not read.
    """
    step = _Step(layers, directions, ranks)
    products = {name: torch.zeros_like(direction) for name, direction in directions.items()}
    sharded = ranks.world > 1 and any(map(is_partitioned, model.parameters()))
    way = BY_DIFFERENCE if _recomputes(model) else None
    for loss_of, _ in losses:
        found = None
        if way != BY_DIFFERENCE:
            # the first batch decides
            with untouched_rng() if way is None else nullcontext():
                found = _by_autograd(model, layers, directions, loss_of, ranks, sharded)
            way = BY_DIFFERENCE if found is None else BY_AUTOGRAD
        if found is None:
            _add_by_difference(model, layers, directions, loss_of, step, products, ranks)
        for name, part in (found or {}).items():
            products[name].add_(part)
    return products, way or BY_DIFFERENCE


def _recomputes(model: nn.Module) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class _Step:
    """How far the difference goes, relative to the size of the weights: a tenth of the cube root of the precision.

    The cube root balances rounding against the third derivative, and that is large in the direction of the gradient.
    """

    def __init__(self, layers: Mapping[str, SpftLinear], directions: Mapping[str, Tensor], ranks: Ranks):
        moved = sum(directions[name].to(torch.float64).square().sum().cpu() for name in layers)
        readable = [layer for layer in layers.values() if not layer.forward_only]
        weights = sum(float(layer.read_weight().to(torch.float32).square().sum()) for layer in readable)
        size = float(ranks.sum_(moved)) ** 0.5
        self._ratio = (weights**0.5 or 1.0) / size if size else 1.0
        self.value: float | None = None

    def of(self, dtype: torch.dtype) -> float:
        """The step for layers whose output has this dtype; the first layer that runs decides."""
        if self.value is None:
            self.value = max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps) ** (1 / 3) / 10 * self._ratio
        return self.value


class _Product(torch.autograd.Function):
    """x V^T, or x V where ``flipped``, for a V that is asked for anew in each backward pass."""

    differentiable_twice = True

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Callable[[], Tensor], flipped: bool = False) -> Tensor:
        ctx.matrix, ctx.flipped = matrix, flipped
        v = matrix().to(x.dtype)
        return matmul(x, v if flipped else v.t())

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        return _Product.apply(grad_y, ctx.matrix, not ctx.flipped), None, None


def _rounds_its_input(layer: SpftLinear) -> bool:
    """Whether it is one of bitsandbytes' 8-bit layers, whose steps would hide a small difference."""
    return getattr(layer.get_base_layer().weight, "dtype", None) == torch.int8


def _direction_of(layer: SpftLinear, rows: Tensor, ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Gives all of V on the device of a tensor; every rank must ask."""

    def direction(like: Tensor) -> Tensor:
        return ranks.concatenate(rows.reshape(-1)).view(layer.out_features, layer.in_features).to(like.device)

    return direction


def _add_by_difference(
    model: nn.Module,
    layers: Mapping[str, SpftLinear],
    directions: Mapping[str, Tensor],
    loss_of: LossOf,
    step: _Step,
    products: dict[str, Tensor],
    ranks: Ranks,
) -> None:
    for sign in (1, -1):

        def moving(name: str, sign: int = sign) -> Callable:
            layer, direction = layers[name], _direction_of(layers[name], directions[name], ranks)
            bias = layer.get_base_layer().bias

            def hook(_, args: tuple, y: Tensor) -> Tensor:
                x, t = args[0].to(y.dtype), sign * step.of(y.dtype)
                if not _rounds_its_input(layer):
                    return y + _Product.apply(x, lambda: t * direction(y))
                moved = _Product.apply(x, lambda: layer.read_weight().to(torch.float32) + t * direction(y))
                return moved if bias is None else moved + bias.to(y.dtype)

            return hook

        with ExitStack() as stack:
            if sign > 0:
                # afterwards the generators go on as after a single run
                stack.enter_context(untouched_rng())
            # before those that gather, which then see the layer with its moved weight
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(moving(name)).remove)
            sums = stack.enter_context(gathered_gradients(model, layers, ranks, sharded=ranks.world > 1))
            loss_of(model).backward()
        for name, total in sums.items():
            products[name].add_(total.to(products[name].device), alpha=sign / (2 * step.value))


def _by_autograd(
    model: nn.Module,
    layers: Mapping[str, SpftLinear],
    directions: Mapping[str, Tensor],
    loss_of: LossOf,
    ranks: Ranks,
    sharded: bool,
) -> dict[str, Tensor] | None:
    """This rank's rows of this batch's H V; None, on every rank, where a step cannot be differentiated twice.

    s = dL/dt is differentiated once more. Its derivative by a layer's y is dY' and that by the layer's own part of dX
    is x', where ' is d/dt; so H V = dY'^T x + dY^T x'.

    Args:
        sharded: whether no rank keeps whole matrices; ranks then wait for each other in every backward pass.
    """
    device = next(iter(directions.values())).device
    t = torch.zeros((), requires_grad=True, device=device, dtype=torch.float32)
    found = {
        name: torch.zeros(
            directions[name].shape if sharded else (layer.out_features, layer.in_features),
            device=directions[name].device,
            dtype=torch.float32,
        )
        for name, layer in layers.items()
    }
    with ExitStack() as stack:
        watch = _Watch(t)
        for name, layer in layers.items():
            add = gradient_adder(found[name], layer.out_features, ranks, sharded)
            before, after = watch.hooks(_direction_of(layer, directions[name], ranks), add, keeps_direction=not sharded)
            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        loss = loss_of(model)
        done = _is_differentiable_twice(loss)
        if done:
            try:
                (slope,) = torch.autograd.grad(loss, t, create_graph=True)
                watch.second = True
                slope.backward()
            except RuntimeError as error:
                ends_on_all = "not implemented" in str(error)
                if not ends_on_all and (sharded or not isinstance(error, torch.OutOfMemoryError)):
                    raise
                done = False
    if ranks.sum_numbers(int(done))[0] < ranks.world:
        return None
    if not sharded:
        reduce_to_shards(found, ranks)
    return found


class _Watch:
    """The hooks that move each layer by t V, and add up what the second differentiation brings.

    Attributes:
        second: whether that is what runs.
    """

    def __init__(self, t: Tensor):
        self.t, self.second = t, False

    def hooks(
        self, direction: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], None], keeps_direction: bool
    ) -> tuple[Callable, Callable]:
        """Those before and after a layer's forward pass; ``add`` takes dY and x of the layer, or their derivatives."""
        inputs: list[tuple[Tensor, Tensor]] = []

        def before(_, args: tuple) -> tuple:
            x = args[0]
            # an alias of the layer's own, whose gradient is this layer's part of dX alone
            own = x.view_as(x)
            inputs.append((x, own))
            return own, *args[1:]

        def after(_, args: tuple, y: Tensor) -> Tensor:
            x, own = inputs.pop()
            kept = direction(y) if keeps_direction else None
            moved = y + self.t.to(y) * _Product.apply(x.to(y.dtype), lambda: direction(y) if kept is None else kept)
            grad_y: list[Tensor] = []

            def at_output(gradient: Tensor) -> None:
                self._add(add, gradient, x) if self.second else grad_y.append(gradient)

            def at_input(gradient: Tensor) -> None:
                if not self.second and gradient.requires_grad:
                    gradient.register_hook(lambda tangent: self._add(add, grad_y[0], tangent))

            moved.register_hook(at_output)
            if own.requires_grad:
                own.register_hook(at_input)
            return moved

        return before, after

    @staticmethod
    @torch.no_grad()
    def _add(add: Callable[[Tensor, Tensor], None], grad_y: Tensor, x: Tensor) -> None:
        add(grad_y, x.to(grad_y.dtype))


def _is_differentiable_twice(loss: Tensor) -> bool:
    """Whether the graph has only steps that autograd knows the second derivative of.

    A function of a library's own in Python may compute its backward pass by a kernel, whose derivative would silently
    be 0; the fused attentions have none.
    """
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not _is_known(node._forward_cls):
            return False
        if "ScaledDotProduct" in node.name():
            return False
        nodes.extend(following for following, _ in node.next_functions)
    return True


def _is_known(function: type) -> bool:
    # what DeepSpeed puts in the place of torch's linear function for ZeRO-3: its backward pass is plain products
    own = getattr(function, "differentiable_twice", False)
    return own or (function.__module__, function.__name__) == (
        "deepspeed.runtime.zero.linear",
        "LinearFunctionForZeroStage3",
    )
