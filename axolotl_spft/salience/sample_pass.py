"""The salience pass: runs the sample through the model, and gives the gradients of the layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import gathered_while_used, is_partitioned
from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.salience.collect import (
    experts_of,
    gathered_sums,
    reached_layers,
    reduce_to_shards,
    should_share_rows,
)
from axolotl_spft.salience.data_free import synaptic_flow
from axolotl_spft.salience.examples import Batch, Tokens, count_examples
from axolotl_spft.salience.hessian import hessian_products
from axolotl_spft.salience.metrics.metric import GATHERED, accumulators_of
from axolotl_spft.salience.metrics.statistics import (
    GRADIENT,
    HESSIAN_GRADIENT,
    INPUT_SQUARES,
    SQUARED_GRADIENT,
    SYNAPTIC_FLOW,
)
from axolotl_spft.salience.out_of_memory import run_on_all_ranks
from axolotl_spft.salience.untouched import untouched_model, untouched_rng
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.without_mask import choosing_a_mask

LossFn = Callable[[nn.Module, Batch], Tensor]


class Collected(NamedTuple):
    """What the pass found.

    Attributes:
        sums: need -> name of the layer -> this rank's rows of the sum over the batches of all ranks, float32.
        read: the examples read.
        notes: what the mask's record says of how it was done.
    """

    sums: dict[str, dict[str, Tensor]]
    read: int
    notes: dict[str, str]


def collect_statistics(
    model: nn.Module,
    layers: Mapping[str, SparseLayer],
    needs: Collection[str],
    batches: Iterable[Batch] | None,
    loss_fn: LossFn | None,
    samples: int,
    ranks: Ranks,
    memory_gib: float | None = None,
) -> Collected:
    """All of ``needs`` that a pass has to find: from the sample, or from the weights alone.

    ``memory_gib`` is as of `gathered_sums`.

    Raises:
        SpftError: there are no batches or no loss, a gradient is not finite, the model does not suit a need.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    read, notes = 0, {}
    if SYNAPTIC_FLOW in needs:
        sums[SYNAPTIC_FLOW] = synaptic_flow(model, layers, ranks)
    gathered = [need for need in GATHERED if need in needs or (need == GRADIENT and HESSIAN_GRADIENT in needs)]
    if not gathered:
        return Collected(sums, read, notes)
    experts = experts_of(layers)
    if experts and SQUARED_GRADIENT in needs:
        raise SpftError(
            "`salience: fisher` squares the gradient of each example, and the inputs of experts that are modules "
            f"({first_of(experts, ', ')}) no longer tell whose tokens they are: name them in `exclude_modules`, or use "
            "`salience: gradient`"
        )
    if experts and HESSIAN_GRADIENT in needs and ranks.world > 1:
        raise SpftError(
            "`salience: grasp` exchanges the gradients of all layers between the ranks, and a rank that sends no token "
            f"to an expert that is a module ({first_of(experts, ', ')}) would not take part: make the mask on one rank "
            "and name it in `mask_path`, name the experts in `exclude_modules`, or use `salience: gradient`"
        )
    sample = _Sample(batches, loss_fn, samples, ranks, twice=HESSIAN_GRADIENT in needs)
    found, read = summed(model, layers, gathered, sample, ranks, memory_gib)
    sums |= found
    if HESSIAN_GRADIENT in needs:
        with quiet(model), untouched_rng():
            sums[HESSIAN_GRADIENT], notes["hessian"] = hessian_products(
                model, layers, sums[GRADIENT], sample.losses("Hessian"), ranks
            )
    return Collected(sums, read, notes)


def summed(
    model: nn.Module,
    layers: Mapping[str, SparseLayer],
    needs: Collection[str],
    sample: _Sample,
    ranks: Ranks,
    memory_gib: float | None = None,
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """This rank's rows of what `gathered_sums` gathers, summed over the batches of all ranks; the examples read."""
    # where the weights are partitioned, whole accumulators would not fit beside them; all ranks or none
    sharded = (
        _is_partitioned(model, ranks)
        or ranks.sum_numbers(int(should_share_rows(layers, ranks, accumulators_of(needs), memory_gib)))[0] > 0
    )
    read, of_inputs_alone = 0, set(needs) == {INPUT_SQUARES}

    def run(loss_of: Callable[[nn.Module], Tensor]) -> None:
        # the forward pass has all inputs
        if of_inputs_alone:
            with torch.no_grad(), suppress(NoLossError):
                loss_of(model)
        else:
            loss_of(model).backward()

    with (
        untouched_rng(),
        quiet(model),
        gathered_sums(model, layers, needs, sample.tokens, ranks, sharded, memory_gib) as sums,
    ):
        for loss_of, count in sample.losses("Salience"):
            run_on_all_ranks(lambda loss_of=loss_of: run(loss_of), ranks, sharded)
            read += count
        for need, of_layers in sums.items():
            if need == INPUT_SQUARES:
                for total in of_layers.values():
                    ranks.sum_(total)
            elif not sharded:
                reduce_to_shards(of_layers, ranks)
    if not read:
        remedy = ", or use `salience: magnitude`"
        if of_inputs_alone:
            remedy = ", as `repair` and metrics of the inputs need them whatever the salience"
        raise SpftError(f"the salience pass found no batches: give at least one{remedy}")
    for need, of_layers in sums.items():
        _check_sums("input" if need == INPUT_SQUARES else "gradient", of_layers, ranks)
    return sums, read


def unreached_by_sample(
    model: nn.Module,
    layers: Mapping[str, SparseLayer],
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    samples: int,
    ranks: Ranks,
) -> list[str]:
    """The layers that no gradient reaches on the sample, of which no more is read than reaches all layers.

    Without a batch or a loss none is known to be unreached.
    """
    sample, names = _Sample(batches, loss_fn, samples, ranks), list(layers)
    partitioned, unreached = _is_partitioned(model, ranks), []
    with untouched_rng(), quiet(model), reached_layers(model, layers) as reached:
        try:
            for loss_of, _ in sample.losses("Used modules"):
                run_on_all_ranks(lambda loss_of=loss_of: loss_of(model).backward(), ranks, partitioned)
                counts = ranks.sum_numbers(*(int(name in reached) for name in names))
                unreached = [name for name, count in zip(names, counts) if not count]
                if not unreached:
                    break
        except NoLossError:
            return []
    # a sample without any gradient, all of whose labels are masked say, tells nothing
    return unreached if len(unreached) < len(names) else []


def _is_partitioned(model: nn.Module, ranks: Ranks) -> bool:
    return ranks.world > 1 and any(is_partitioned(parameter) for parameter in model.parameters())


class NoLossError(SpftError):
    """The model gave no loss for a batch."""


def loss_of_batch(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """What ``loss_fn`` makes of a batch, or without one the model's own loss.

    Raises:
        NoLossError: there is none.
    """
    loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
    if loss is None:
        raise NoLossError("the model gave no loss: put `labels` into the batches, or pass `loss_fn`")
    return loss


class _Sample:
    """The batches that the pass reads, and the loss of each.

    Args:
        twice: whether `losses` is asked for again; the batches of an iterator are then kept.
    """

    def __init__(
        self,
        batches: Iterable[Batch] | None,
        loss_fn: LossFn | None,
        samples: int,
        ranks: Ranks,
        twice: bool = False,
    ):
        self.batches, self.loss_fn, self.samples, self.ranks = batches or (), loss_fn, samples, ranks
        self.tokens = Tokens({})
        self.tokens.end()
        self._kept: list[Batch] | None = [] if twice and iter(self.batches) is self.batches else None

    def losses(self, title: str) -> Iterator[tuple[Callable[[nn.Module], Tensor], int]]:
        """For each batch the function that gives its loss, and the examples of all ranks in it."""
        read, batches = 0, self._kept or self.batches
        with tqdm(total=self.samples, desc=title, unit="example", disable=self.ranks.rank != 0) as bar:
            for batch, count in batches_of_all_ranks(batches, self.ranks):
                if self._kept is not None and batches is not self._kept:
                    self._kept.append(batch)
                self.tokens.read(batch)
                yield lambda model, batch=batch: loss_of_batch(model, batch, self.loss_fn), count
                self.tokens.end()
                read += count
                bar.update(min(count, self.samples - bar.n))
                if read >= self.samples:
                    break


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """What every pass runs in: a model that is as before afterwards, whole where it runs, and not compiled."""
    with (
        untouched_model(model),
        choosing_a_mask(),
        gathered_while_used(model),
        _uncompiled(model),
        torch.enable_grad(),
    ):
        yield


def _uncompiled(model: nn.Module) -> AbstractContextManager:
    """Runs a compiled model as it is written: a graph from before does not know the hooks of the pass."""
    compiled = any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _check_sums(what: str, sums: Mapping[str, Tensor], ranks: Ranks) -> None:
    finite = ranks.sum_numbers(*(int(torch.isfinite(total).all()) for total in sums.values()))
    for name, count in zip(sums, finite):
        if count < ranks.world:
            raise SpftError(
                f"the {what} of {name} is not finite on the sample: check the data and the precision of the run"
            )


def batches_of_all_ranks(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, int]]:
    """Each batch with the examples of all ranks' batches of that turn, until one rank has no more."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        examples, givers = ranks.sum_numbers(0 if batch is None else count_examples(batch), int(batch is not None))
        if givers < ranks.world:
            return
        yield batch, examples
