"""A linear layer with sparse deltas on a frozen base layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft.ops.backends.products import cast
from axolotl_spft.ops.branch import add_sparse_branch
from axolotl_spft.ops.linear import Delta, frozen_linear, owner_of, sparse_linear
from axolotl_spft.ops.mask.plan import make_plan
from axolotl_spft.tuner.base_weight import keep_dequantizable
from axolotl_spft.tuner.offloading import execution_device, is_offloaded
from axolotl_spft.tuner.shared_input import SharedInput
from axolotl_spft.tuner.sparse_layer import SparseLayer


class SpftLinear(SparseLayer):
    """y = x (W + S)^T + b with a frozen W (out_features, in_features) and one sparse S per adapter."""

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
        self._deltas = {}
        self.share_input(SharedInput([self]))
        self.add_empty_adapter(adapter_name)

    def share_input(self, shared_input: SharedInput) -> None:
        """Say which layers read the same tensor, this one among them."""
        self._shared_input = shared_input
        self._forget_derived()

    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._shared_input.forget()
        for layer in self._shared_input.readers:
            # of the active adapters: where their values stand, and for several where each one's go in the union
            layer._deltas: dict[tuple[str, ...], tuple[Delta, tuple[Tensor, ...]]] = {}

    # --- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_output(x, *args, **kwargs)
        names = () if self.merged_adapters else self._filled_active_adapters()
        if not names and not self.keeps_gathered_weight:
            return self._base_output(x, *args, **kwargs)
        if names:
            _have_delta(self._owner, names)
        if self.forward_only:
            delta, places = self._deltas[names]
            y = self._base_output(x, *args, **kwargs)
            return add_sparse_branch(y, x, self._values(names, delta, places), delta.mask, delta.plan)
        base_layer = self.get_base_layer()
        if not is_offloaded(base_layer):
            return self._multiply(x, base_layer, names)
        with self.brought_in():
            return self._multiply(x.to(execution_device(base_layer)), base_layer, names)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # accelerate's hook on the base layer does the same, but needs the scales of a 4-bit weight
        with self.brought_in():
            return self.base_layer(x, *args, **kwargs)

    def _multiply(self, x: Tensor, base_layer: nn.Module, names: tuple[str, ...]) -> Tensor:
        """y of the base layer with these adapters, without its own forward pass."""
        # which leaves double precision alone
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
        elif self.quantization_backend is not None:
            # bitsandbytes' 4-bit layers multiply in a dtype of their own
            dtype = getattr(base_layer, "compute_dtype", None) or x.dtype
        else:
            dtype = x.dtype
        inputs, bias = cast(x, dtype), base_layer.bias
        if bias is not None:
            bias = cast(bias, dtype)
        if names:
            delta, places = self._deltas[names]
            values, kept = self._values(names, delta, places), None
            if values.requires_grad and torch.is_grad_enabled():
                kept = self._shared_input.keep(x, inputs, delta.plan)
            y = sparse_linear(inputs, kept, bias, values, delta, self, self._owner)
        else:
            y = frozen_linear(inputs, bias, self)
        return y if autocast else cast(y, x.dtype)

    def _values(self, names: tuple[str, ...], delta: Delta, places: tuple[Tensor, ...]) -> Tensor:
        if len(names) == 1:
            return self.values(names[0])
        each = [self.values(name) for name in names]
        total = each[0].new_zeros(delta.mask.nnz)
        for values, at in zip(each, places):
            total = total.index_add(0, at, values.to(total.dtype))
        return total

    def _make_delta(self, names: tuple[str, ...]) -> tuple[Delta, tuple[Tensor, ...]]:
        mask, places = self.mask(names[0]), ()
        # training later must be able to keep what an evaluation has made
        with torch.inference_mode(False), torch.no_grad():
            if len(names) > 1:
                mask, places = self._union(names)
            plan = make_plan(mask, self.in_features, columns=self._shared_input.columns(names))
        return Delta(mask, plan), places


@torch.compiler.assume_constant_result
def _have_delta(owner: int, names: tuple[str, ...]) -> None:
    """Make the delta of these adapters if there is none yet: torch.compile runs this while it traces the layer."""
    # by its number: some versions of torch.compile take no module here
    layer = owner_of(owner)
    if names not in layer._deltas:
        layer._deltas[names] = layer._make_delta(names)
