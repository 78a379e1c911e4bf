"""A loop with a dynamic mask, and the same as masked dense training from its definition."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft import DynamicMask, SparseAdamW, SpftConfig, select_mask
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience.install import adapted_layers
from tests.models import token_batch

DENSITY, RATE, DECAY = 0.07, 1e-2, 0.1


def adapted(base: nn.Module, **options) -> nn.Module:
    """With a mask of gradients."""
    model = get_peft_model(base, SpftConfig(**{"density": DENSITY, "samples": 8, **options}))
    select_mask(model, [token_batch(rows=4, seed=1), token_batch(rows=4, seed=2)])
    return model


def optimizer_of(model: nn.Module, state_bits: int = 32) -> SparseAdamW:
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SparseAdamW(values, lr=RATE, weight_decay=DECAY, state_bits=state_bits)


def micro_batches(step: int, accumulate: int) -> list[dict]:
    return [token_batch(seed=100 + step * accumulate + part) for part in range(accumulate)]


def train(model, optimizer, steps, every=0, collect=1, accumulate=2, dynamic=None, first_step=1, **options):
    """Train with a re-selection after every ``every`` steps; the losses, and the dynamic mask."""
    dynamic = dynamic or (DynamicMask(model, **options) if every else None)
    losses = []
    for step in range(first_step, steps + 1):
        due, batches = every and step % every == 0, micro_batches(step, accumulate)
        for part, batch in enumerate(batches):
            with dynamic.collecting(part >= accumulate - collect) if due else nullcontext():
                loss = model(**batch).loss / accumulate
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if due:
            dynamic.reselect(optimizer, step)
    return losses, dynamic


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """For each layer where it is trained: bool, (out_features, in_features)."""
    masks = {}
    for name, layer in adapted_layers(model).items():
        masks[name] = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
        masks[name].view(-1)[positions(layer.mask("default"), layer.in_features).cpu()] = True
    return masks


def values_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.spft_values["default"].detach() for layer in adapted_layers(model).values()])


class MaskedDense:
    """AdamW on D in W + D with the gradient times a mask that changes; all tensors are (out_features, in_features).

    Of the layers in ``originals`` W has these where the mask is, and elsewhere what ``model`` has.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, torch.Tensor],
        fraction: float,
        per_row: bool,
        drop: str,
        originals: dict[str, torch.Tensor] | None = None,
    ):
        self.model, self.masks, self.fraction, self.per_row, self.drop = model, dict(masks), fraction, per_row, drop
        parameters, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
        # experts go by the names of their parameters, which have three dimensions
        self.weights = {name: parameters.get(name, parameters.get(f"{name}.weight")) for name in masks}
        self.transposed = {
            name
            for name in masks
            if isinstance(modules.get(name), Conv1D)
            or (name in parameters and getattr(modules[name.rpartition(".")[0]], "is_transposed", False))
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.start = {name: self._seen(weight.detach().clone(), name) for name, weight in self.weights.items()}
        self.deltas = {name: torch.zeros_like(start, requires_grad=True) for name, start in self.start.items()}
        self.quantized, self.originals = dict(self.start), originals or {}
        for name in masks:
            self._repair(name)
        self._write()
        self.optimizer = torch.optim.AdamW(self.deltas.values(), lr=RATE, weight_decay=DECAY)

    def _seen(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        return (weight.mT if name in self.transposed else weight).flatten(0, -2)

    def train(self, steps: int, every: int, collect: int, accumulate: int = 2) -> list[float]:
        losses = []
        for step in range(1, steps + 1):
            collected = {name: torch.zeros_like(start) for name, start in self.start.items()}
            summed = {name: torch.zeros_like(start) for name, start in self.start.items()}
            for part, batch in enumerate(micro_batches(step, accumulate)):
                loss = self.model(**batch).loss / accumulate
                loss.backward()
                losses.append(loss.item())
                for name, weight in self.weights.items():
                    gradient = self._seen(weight.grad, name)
                    weight.grad = None
                    summed[name] += gradient
                    collected[name] += gradient * (part >= accumulate - collect)
            for name, delta in self.deltas.items():
                delta.grad = summed[name] * self.masks[name]
            self.optimizer.step()
            if step % every == 0:
                for name in self.masks:
                    self._exchange(name, collected[name])
            self._write()
        return losses

    @torch.no_grad()
    def _exchange(self, name: str, gradient: torch.Tensor) -> None:
        mask, delta = self.masks[name], self.deltas[name]
        state = self.optimizer.state[delta]
        importance = delta.abs() * (gradient.abs() if self.drop == "value_gradient" else 1)
        before, after = mask.clone(), mask.clone()
        rows = range(len(mask)) if self.per_row else [slice(None)]
        for row in rows:
            inside, where = importance[row].reshape(-1), before[row].reshape(-1)
            count = min(int(self.fraction * int(where.sum()) + 1e-9), int((~where).sum()))
            least = torch.where(where, inside, torch.inf).sort(stable=True).indices[:count]
            score = torch.where(where, -torch.inf, gradient[row].reshape(-1).abs())
            best = score.sort(descending=True, stable=True).indices[:count]
            chosen = where.clone()
            chosen[least], chosen[best] = False, True
            after[row] = chosen.view(before[row].shape)
        for tensor in (delta, state["exp_avg"], state["exp_avg_sq"]):
            # what was dropped, and what was grown
            tensor[before != after] = 0
        self.masks[name] = after
        self._repair(name)

    def _repair(self, name: str) -> None:
        if name in self.originals:
            self.start[name] = torch.where(self.masks[name], self.originals[name], self.quantized[name])

    @torch.no_grad()
    def _write(self) -> None:
        for name, weight in self.weights.items():
            stored = weight.mT if name in self.transposed else weight
            stored.copy_((self.start[name] + self.deltas[name]).view(stored.shape))
