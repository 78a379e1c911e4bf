"""The salience pass: runs the sample through the model, and gives the gradients of the layers' weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import gathered_while_used, is_partitioned
from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.salience.collect import gathered_gradients, reduce_to_shards, should_share_rows
from axolotl_spft.salience.examples import Batch, count_examples
from axolotl_spft.salience.untouched import untouched_model, untouched_rng
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.without_mask import choosing_a_mask


def summed_gradients(
    model: nn.Module,
    layers: Mapping[str, SpftLinear],
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    samples: int,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], int]:
    """This rank's rows of each layer's gradient, summed over the batches of all ranks; and the examples read."""
    read = 0
    # where the weights are partitioned, whole accumulators would not fit beside them
    partitioned = ranks.world > 1 and any(is_partitioned(parameter) for parameter in model.parameters())
    # all ranks or none
    sharded = partitioned or ranks.sum_numbers(int(should_share_rows(layers, ranks)))[0] > 0
    with (
        untouched_rng(),
        untouched_model(model),
        choosing_a_mask(),
        gathered_while_used(model),
        gathered_gradients(model, layers, ranks, sharded) as sums,
        tqdm(total=samples, desc="Salience", unit="example", disable=ranks.rank != 0) as bar,
        _uncompiled(model),
        torch.enable_grad(),
    ):
        for batch, count in _batches_of_all_ranks(batches or (), ranks):
            loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
            if loss is None:
                raise SpftError("the model gave no loss: put `labels` into the batches, or pass `loss_fn`")
            loss.backward()
            read += count
            bar.update(min(count, samples - bar.n))
            if read >= samples:
                break
        if not sharded:
            reduce_to_shards(sums, ranks)
    if not read:
        raise SpftError("the salience pass found no batches: give at least one, or use `salience: magnitude`")
    _check_gradients(sums, ranks)
    return sums, read


def _uncompiled(model: nn.Module) -> AbstractContextManager:
    """Runs a compiled model as it is written: a graph from before does not know the hooks of the pass."""
    compiled = any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _check_gradients(sums: Mapping[str, Tensor], ranks: Ranks) -> None:
    finite = ranks.sum_numbers(*(int(torch.isfinite(total).all()) for total in sums.values()))
    reached = ranks.sum_numbers(*(int(total.any()) for total in sums.values()))
    for name, count in zip(sums, finite):
        if count < ranks.world:
            raise SpftError(
                f"the gradient of {name} is not finite on the sample: check the data and the precision of the run"
            )
    untouched = [name for name, count in zip(sums, reached) if not count]
    if untouched and ranks.rank == 0:
        warnings.warn(
            f"no gradient reached {first_of(untouched, ', ')} on the sample, so their values may never be "
            "trained: name modules whose weights are read without calling them (Mamba's dt_proj) in `exclude_modules`; "
            "experts that no token came to may need more `samples`",
            stacklevel=2,
        )


def _batches_of_all_ranks(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, int]]:
    """Each batch with the examples of all ranks' batches of that turn, until one rank has no more."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        examples, givers = ranks.sum_numbers(0 if batch is None else count_examples(batch), int(batch is not None))
        if givers < ranks.world:
            return
        yield batch, examples
