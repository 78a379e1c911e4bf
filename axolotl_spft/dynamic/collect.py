"""Keeps what the dense gradients of frozen weights are made of, and makes them later, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from axolotl_spft.dynamic.expert_passes import ExpertPasses
from axolotl_spft.dynamic.kept_input import KeptInput
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.adders import gradient_part_of
from axolotl_spft.salience.collect import device_of, devices_of
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.sparse_layer import SparseLayer


class Collector:
    """The inputs X and the output gradients dY of layers, of every backward pass between `start` and `stop`.

    Of a layer dW = sum of dY^T X over these passes, and over the modules that compute with it (a tied embedding and
    head); of an embedding the sum of dY over the tokens of each row. What is kept takes (in_features + out_features)
    numbers a token and layer, with layers that read one x counted once: on a GPU as long as half of its free memory
    holds them, then on the host. Gradient checkpointing goes on as it is: nothing is kept before the backward pass.

    Of experts that are one parameter the inputs and the output gradient of their module are kept, see `ExpertPasses`.

    Args:
        model: that the layers are in.
        layers: by name.
        adapter_name: passes in which another adapter is active, or none, are left out.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SparseLayer], adapter_name: str):
        self.layers, self.adapter_name = layers, adapter_name
        self._pairs: dict[str, list[tuple[nn.Module, KeptInput, Tensor]]] = {}
        self._experts: dict[str, ExpertPasses] = {}
        for name, layer in layers.items():
            if isinstance(layer, ExpertMatrix):
                module = name.rpartition(".")[0]
                self._experts[module] = ExpertPasses(
                    module, model.get_submodule(module), adapter_name, self._is_trained, self._placed
                )
            else:
                self._pairs[name] = []
        self._handles: list = []
        self._room: dict[torch.device, int] = {}
        self._last: KeptInput | None = None

    def start(self) -> None:
        """Begin, or go on; does nothing while it collects."""
        if self._handles:
            return
        if not any(self.passes()):
            on_gpus = [device for device in devices_of(self.layers) if device.type == "cuda"]
            self._room = {device: torch.cuda.mem_get_info(device)[0] // 2 for device in on_gpus}
        self._handles = [
            module.register_forward_hook(partial(self._after_forward, name))
            for name in self._pairs
            for module in (self.layers[name], *self.layers[name].readers)
        ]
        self._handles += [
            each.experts.register_forward_hook(each.after_forward, with_kwargs=True) for each in self._experts.values()
        ]

    def stop(self) -> None:
        """End collecting; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], None

    def forget(self) -> None:
        """Let go of what was collected."""
        self._pairs = {name: [] for name in self._pairs}
        for each in self._experts.values():
            each.forget()

    def passes(self) -> list[int]:
        """How many backward passes through each layer were collected."""
        return [
            len(self._pairs[name]) if name in self._pairs else self._experts_of(name).count(layer)
            for name, layer in self.layers.items()
        ]

    def groups(self) -> list[list[str]]:
        """The layers, those together whose gradients must all be made before the S of one is changed."""
        groups: dict[str, list[str]] = {}
        for name in self.layers:
            groups.setdefault(name if name in self._pairs else name.rpartition(".")[0], []).append(name)
        return list(groups.values())

    def take_gradient(self, name: str, ranks: Ranks) -> Tensor:
        """This rank's rows of dW, summed over all ranks, which must all ask: (rows, in_features) float32.

        At a time there is the part of one rank, of experts their whole gradient. What it was made of is let go, but of
        experts.
        """
        layer, mine = self.layers[name], None
        if name not in self._pairs:
            whole = self._experts_of(name).gradient(layer)
            for rank in range(ranks.world):
                part = ranks.sum_to_(whole[ranks.rows(layer.out_features, rank)], rank)
                mine = part if rank == ranks.rank else mine
            return mine
        device = device_of(layer)
        pairs = [(gradient_part_of(module), x.kept.to(device), dy.to(device)) for module, x, dy in self._pairs[name]]
        self._pairs[name] = []
        for rank in range(ranks.world):
            rows = ranks.rows(layer.out_features, rank)
            total = torch.zeros(rows.stop - rows.start, layer.in_features, dtype=torch.float32, device=device)
            for part, x, grad_y in pairs:
                total.add_(part(grad_y, x.to(grad_y.dtype) if x.is_floating_point() else x, rows))
            ranks.sum_to_(total, rank)
            if rank == ranks.rank:
                mine = total
        return mine

    def _experts_of(self, name: str) -> ExpertPasses:
        return self._experts[name.rpartition(".")[0]]

    def _is_trained(self, layer: SparseLayer) -> bool:
        if layer.disable_adapters or layer.merged or self.adapter_name not in layer._filled_active_adapters():
            return False
        return layer.spft_values._parameters[self.adapter_name].requires_grad

    def _after_forward(self, name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        if not torch.is_grad_enabled() or not y.requires_grad or not self._is_trained(self.layers[name]):
            return
        x = args[0]
        if self._last is None or not self._last.is_of(x):
            self._last = KeptInput(x)
        held = self._last
        y.register_hook(lambda grad_y: self._keep(name, module, held, grad_y))

    def _keep(self, name: str, module: nn.Module, held: KeptInput, grad_y: Tensor) -> None:
        held.keep(name, self._placed)
        self._pairs[name].append((module, held, self._placed(grad_y.detach())))

    def _placed(self, tensor: Tensor) -> Tensor:
        if tensor.device not in self._room:
            return tensor
        self._room[tensor.device] -= tensor.nbytes
        return tensor if self._room[tensor.device] >= 0 else tensor.to("cpu")
