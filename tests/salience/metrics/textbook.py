"""Every statistic of the pass by its definition, in float64, with one dense gradient for each weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.models import VOCABULARY

Batch = dict[str, Tensor]


def packed(lengths: Sequence[int]) -> tuple[Batch, list[Batch]]:
    """One row of several texts, and each by itself."""
    tokens = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(9))
    labels, start, alone = tokens.clone(), 0, []
    for length in lengths:
        # no text predicts the first token of the next
        labels[:, start] = -100
        part = slice(start, start + length)
        alone.append({"input_ids": tokens[:, part], "labels": labels[:, part], "use_cache": False})
        start += length
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": tokens, "labels": labels, "position_ids": position_ids, "use_cache": False}, alone


def rows_of(batch: Batch) -> list[Batch]:
    return [
        {key: x[i : i + 1] if isinstance(x, Tensor) else x for key, x in batch.items()}
        for i in range(len(batch["input_ids"]))
    ]


def predicted(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


class Textbook:
    """Of a float64 model with plain weights.

    Args:
        names: of the linear layers.
        batches: each with its examples, one at a time.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[tuple[Batch, list[Batch]]]):
        self.model, self.batches = model.double().requires_grad_(True), batches
        self.modules = [model.get_submodule(name) for name in names]
        self.parameters = [module.weight for module in self.modules]

    def oriented(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        return [
            (matrix.t() if "Conv1D" in type(module).__name__ else matrix).detach()
            for module, matrix in zip(self.modules, matrices)
        ]

    def weights(self) -> list[Tensor]:
        return self.oriented(self.parameters)

    def _gradients(self, loss: Tensor, graph: bool = False) -> list[Tensor]:
        return torch.autograd.grad(loss, self.parameters, create_graph=graph)

    def gradients(self) -> list[Tensor]:
        return self.oriented(self._gradients(sum(self.model(**batch).loss for batch, _ in self.batches)))

    def squares(self) -> list[Tensor]:
        """One backward pass for each example."""
        totals = [torch.zeros_like(p) for p in self.parameters]
        for batch, examples in self.batches:
            for example in examples:
                share = self.model(**example).loss * predicted(example) / predicted(batch)
                for total, gradient in zip(totals, self._gradients(share)):
                    total += gradient**2
        return self.oriented(totals)

    def hessian_gradients(self) -> list[Tensor]:
        loss = sum(self.model(**batch).loss for batch, _ in self.batches)
        gradients = self._gradients(loss, graph=True)
        return self.oriented(self._gradients(sum((g * g.detach()).sum() for g in gradients)))

    def flows(self) -> list[Tensor]:
        network = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.abs_()
        for module in list(network.modules()):
            for name, _ in list(module.named_children()):
                if name in ("act_fn", "act"):
                    setattr(module, name, nn.Identity())
        ones = torch.ones(1, 1, network.config.hidden_size, dtype=torch.float64)
        with patch("torch.nn.functional.softmax", lambda x, *_, **__: x):
            total = network.eval()(inputs_embeds=ones).logits.sum()
        names = {id(module): name for name, module in self.model.named_modules()}
        own = [network.get_submodule(names[id(module)]).weight for module in self.modules]
        return self.oriented(torch.autograd.grad(total, own))

    def score(self, metric: str, lift_rank: int) -> list[Tensor]:
        """Of the metrics that have a formula of their own here; the control has none."""
        if metric == "magnitude":
            return [w.abs() for w in self.weights()]
        if metric == "lift":
            return [_low_rank(w, lift_rank).abs() for w in self.weights()]
        if metric == "fisher":
            return self.squares()
        if metric == "synflow":
            return [(w.abs() * flow).abs() for w, flow in zip(self.weights(), self.flows())]
        if metric == "grasp":
            return [w * product for w, product in zip(self.weights(), self.hessian_gradients())]
        return [FIRST_ORDER[metric](w, g) for w, g in zip(self.weights(), self.gradients())]


FIRST_ORDER = {
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "relative": lambda w, g: g.abs() / (w.abs() + 1e-8),
    "force": lambda w, g: -w * g,
    "taylor_fo": lambda w, g: (w * g) ** 2,
    "balanced": lambda w, g: g.abs() / ((g**2).mean(1, True).sqrt() * (g**2).mean(0, True).sqrt()).sqrt(),
}


def _low_rank(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, min(rank, (min(weight.shape) - 1) // 2))
    return (u[:, :rank] * s[:rank]) @ v[:rank]
