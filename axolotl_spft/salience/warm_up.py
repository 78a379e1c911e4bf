"""A throw-away warm-up before the salience is computed: some steps of training, of which nothing stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import is_partitioned
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.optim import SparseAdamW
from axolotl_spft.salience.choose import choose_positions
from axolotl_spft.salience.examples import Batch
from axolotl_spft.salience.metrics.metric import OF_ALL_MATRICES, Metric, load_metric
from axolotl_spft.salience.out_of_memory import run_on_all_ranks
from axolotl_spft.salience.sample_pass import batches_of_all_ranks, loss_of_batch, quiet
from axolotl_spft.salience.scores import scorer
from axolotl_spft.salience.untouched import untouched_rng
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of


class Repeatable:
    """The batches of an iterator, kept as they are read, so that they can be read again from the first."""

    def __init__(self, batches: Iterator[Batch]):
        self._rest, self._read = batches, []

    def __iter__(self) -> Iterator[Batch]:
        place = 0
        while True:
            if place == len(self._read):
                batch = next(self._rest, None)
                if batch is None:
                    return
                self._read.append(batch)
            yield self._read[place]
            place += 1


def repeatable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """``batches``, or where they are an iterator, which can be read once, something that keeps them."""
    return Repeatable(batches) if iter(batches) is batches else batches


def check_warm_up(
    model: nn.Module, metric: Metric, steps: int, batches: Iterable[Batch] | None, learning_rate: float | None
) -> None:
    """Check that a warm-up can be made, before anything runs.

    Raises:
        SpftError: it cannot; the message names the option ``score_after``.
    """
    key = f"`score_after: {steps}`"
    if batches is None:
        raise SpftError(f"{key} trains on batches: give some")
    if learning_rate is None:
        raise SpftError(f"{key} trains at the run's learning rate: pass `learning_rate`")
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        raise SpftError(
            f"{key} trains before DeepSpeed's engine exists, and ZeRO-3 has partitioned the weights by then, which a "
            "sparse layer with values must have whole: use ZeRO-1, ZeRO-2 or DDP, or make the mask there and name it "
            "in `mask_path`"
        )
    if metric.needs & OF_ALL_MATRICES:
        raise SpftError(
            f"{key} has no meaning with `salience: {metric.name}`, which is defined at the pretrained weights: leave "
            "it out, or use another salience"
        )


@contextmanager
def warmed_up(
    model: nn.Module,
    config: SpftConfig,
    layers: Mapping[str, SparseLayer],
    adapter_name: str,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    learning_rate: float,
    trainable: list[bool],
    ranks: Ranks,
) -> Iterator[None]:
    """Within the block the model is what ``config.score_after`` optimizer steps have made of it.

    They train the values of a ``random`` mask of the config's own budget with `SparseAdamW` and the mean of the ranks'
    gradients; a step is over after ``batches.batches_per_step`` batches (1 where there is no such attribute). These are
    parameters of their own: however the block ends, the adapter has its own empty ones again, and random generators,
    gradients and flags are as before, bit for bit, since the base weights are never changed.
    """
    before = {name: (layer.mask(adapter_name), layer.spft_values[adapter_name]) for name, layer in layers.items()}
    try:
        for name, (_, own) in before.items():
            layers[name].spft_values[adapter_name] = nn.Parameter(torch.empty_like(own), own.requires_grad)
        with untouched_rng():
            score_of = scorer(load_metric("random"), layers, {}, ranks, config.seed or 0)
            shapes = shapes_of(layers)
            chosen = choose_positions(config, list(layers), list(shapes.values()), score_of, ranks, trainable)
            for (name, shape), positions in zip(shapes.items(), chosen):
                layers[name].set_mask(adapter_name, mask_from_positions(positions, *shape))
            values = [layers[name].spft_values[adapter_name] for name, at in zip(layers, chosen) if len(at)]
            with quiet(model):
                for parameter in values:
                    parameter.requires_grad_(True)
                _train(model, values, config.score_after, batches, loss_fn, learning_rate, ranks)
        for parameter in values:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for name, layer in layers.items():
            mask, own = before[name]
            layer.spft_values[adapter_name] = own
            layer.set_mask(adapter_name, mask, own.detach())
            layer.spft_values[adapter_name].requires_grad_(own.requires_grad)


def weight_with_values(layer: SparseLayer, adapter_name: str) -> Tensor:
    """W + S of one adapter, float32: (out_features, in_features)."""
    return layer.read_weight().to(torch.float32) + layer.get_delta_weight(adapter_name).to(torch.float32)


def _train(
    model: nn.Module,
    values: list[nn.Parameter],
    steps: int,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    learning_rate: float,
    ranks: Ranks,
) -> None:
    optimizer = SparseAdamW(values, lr=learning_rate)
    per_step, done = getattr(batches, "batches_per_step", 1), 0

    def step() -> None:
        for parameter in values:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            ranks.sum_(parameter.grad).div_(ranks.world)
        optimizer.step()
        optimizer.zero_grad()

    def backward(batch: Batch) -> None:
        loss_of_batch(model, batch, loss_fn).backward()

    while done < steps:
        count = 0
        for batch, _ in batches_of_all_ranks(batches, ranks):
            run_on_all_ranks(lambda batch=batch: backward(batch), ranks, sharded=False)
            count += 1
            if count % per_step == 0:
                step()
                done += 1
            if done == steps:
                return
        if not count:
            raise SpftError(f"the warm-up of `score_after: {steps}` found no batches: give at least one")
        # the sample is over, in the middle of a step or not; its next reading begins another
        if count % per_step:
            step()
            done += 1
