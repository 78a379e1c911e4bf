"""A linear layer with sparse deltas on a frozen base layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft.ops.backends.products import cast
from axolotl_spft.ops.branch import add_sparse_branch
from axolotl_spft.ops.frozen import frozen_linear
from axolotl_spft.ops.linear import sparse_linear
from axolotl_spft.tuner.base_weight import keep_dequantizable
from axolotl_spft.tuner.mixed_batch import add_branches_
from axolotl_spft.tuner.offloading import execution_device, is_offloaded
from axolotl_spft.tuner.shared_input import SharedInput, group_by_input
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import spft_layers


class SpftLinear(SparseLayer):
    """y = x (W + S)^T + b with a frozen W (out_features, in_features) and one sparse S per adapter."""

    mixes_rows = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, **quantization_kwargs: Any):
        innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        keep_dequantizable(innermost)
        in_features, out_features = _get_in_out_features(innermost)
        super().__init__(
            base_layer,
            adapter_name,
            (out_features, in_features),
            transposed=isinstance(innermost, Conv1D),
            quantization_backend=resolve_quantization_backend(innermost, **quantization_kwargs),
        )
        self.share_input(SharedInput([self]))
        self.add_empty_adapter(adapter_name)

    @property
    def repairs(self) -> bool:
        return self.quantization_backend is not None and not self.forward_only

    def share_input(self, shared_input: SharedInput) -> None:
        """Say which layers read the same tensor, this one among them."""
        self._shared_input = shared_input
        self._forget_derived()

    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._shared_input.forget()
        for layer in self._shared_input.readers:
            layer._deltas = {}

    def _columns_to_keep(self, names: tuple[str, ...]) -> Tensor | None:
        return self._shared_input.columns(names)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None and not self._disable_adapters:
            self.revert()
            return add_branches_(self._base_output(x, *args, **kwargs), x, self, adapter_names)
        disabled, names = self._disable_adapters, self.adapters_to_apply()
        if not names and (disabled or not self.keeps_gathered_weight) and not self.reads_weight_again(x):
            return self._base_output(x, *args, **kwargs)
        # the layer of another method inside multiplies W, and adds what is its own
        nested = isinstance(self._modules["base_layer"], BaseTunerLayer)
        if self.forward_only or (names and nested):
            delta, values = self.delta_of(names)
            y = self._base_output(x, *args, **kwargs)
            values = self.added_to_weight(values, delta.mask, delta.originals)
            return add_sparse_branch(y, x, values, delta.mask, delta.plan)
        base_layer = self.get_base_layer()
        if not is_offloaded(base_layer):
            return multiply(x, base_layer, self, names, self._shared_input)
        with self.brought_in():
            return multiply(x.to(execution_device(base_layer)), base_layer, self, names, self._shared_input)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # accelerate's hook on the base layer does the same, but needs the scales of a 4-bit weight
        with self.brought_in():
            return self.base_layer(x, *args, **kwargs)


def multiply(
    x: Tensor, base_layer: nn.Module, owner: SparseLayer, names: tuple[str, ...], shared_input: SharedInput
) -> Tensor:
    """y of a linear base layer with these adapters, without its own forward pass.

    Args:
        owner: holds W, which is the base layer's, and S.
        names: of the adapters; none where W alone is multiplied.
        shared_input: keeps what backward needs of x.
    """
    # which leaves double precision alone
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif owner.quantization_backend is not None:
        # bitsandbytes' 4-bit layers multiply in a dtype of their own
        dtype = getattr(base_layer, "compute_dtype", None) or x.dtype
    else:
        dtype = x.dtype
    inputs, bias = cast(x, dtype), base_layer.bias
    if bias is not None:
        bias = cast(bias, dtype)
    if names:
        delta, values = owner.delta_of(names)
        kept = None
        if values.requires_grad and torch.is_grad_enabled():
            kept = shared_input.keep(x, inputs, delta.plan)
        y = sparse_linear(inputs, kept, bias, values, delta, owner, owner._owner)
    else:
        y = frozen_linear(inputs, bias, owner.out_features, owner, owner._owner)
    return y if autocast else cast(y, x.dtype)


def mark_shared_inputs(model: nn.Module) -> None:
    """Tell linear layers which others read the same tensor."""
    layers = {name: layer for name, layer in spft_layers(model).items() if isinstance(layer, SpftLinear)}
    for names in group_by_input({name: layer.in_features for name, layer in layers.items()}):
        readers = [layers[name] for name in names]
        shared_input = SharedInput(readers)
        for layer in readers:
            layer.share_input(shared_input)
