"""`select_mask`: from an empty adapter to one with the most salient positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import gathered_while_used, is_partitioned
from axolotl_spft.errors import SpftError, SpftFileError, first_of
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions
from axolotl_spft.salience.collect import gathered_gradients, reduce_to_shards, should_share_rows
from axolotl_spft.salience.mask_file import check_mask_path, load_masks, save_masks
from axolotl_spft.salience.release import give_back_memory
from axolotl_spft.salience.report import MaskReport, report_masks
from axolotl_spft.salience.scores import (
    NEEDS_GRADIENT,
    balanced_score,
    gradient_score,
    magnitude_score,
    random_score,
)
from axolotl_spft.salience.select import top_k, top_k_per_row
from axolotl_spft.salience.untouched import untouched_model, untouched_rng
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.state import base_shapes_of, mask_checksum, shapes_of, slots_of, spft_layers

Batch = Mapping[str, Any]
# how the names of a batch's text end, those of pairs of texts too
_TEXT = ("input_ids", "inputs_embeds", "labels")


@torch.inference_mode(False)
def select_mask(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    adapter_name: str | None = None,
) -> MaskReport:
    """Choose the positions that an empty adapter trains, and put values of 0 there.

    The adapter's `SpftConfig` says how: salience, scope, budget, samples, seed, mask_path. The salience ``gradient``
    sums the gradient of the loss over batches until ``samples`` examples are read. Nothing else is changed: random
    generators, gradients, modes, hooks and ``requires_grad`` are afterwards as before. Make the optimizer afterwards.

    Args:
        model: a `PeftModel` with an SPFT adapter.
        batches: dicts for ``model(**batch)`` on the model's device; not read (and may be None) where the salience
            needs no gradient or ``mask_path`` names a file.
        loss_fn: the loss of (model, batch), a scalar; ``model(**batch).loss`` by default.
        adapter_name: the active adapter by default.

    Returns:
        What was selected; ``str(report)`` is a table.

    Raises:
        SpftError: the adapter has a mask already, there are no batches or no loss, a gradient is not finite.
        SpftFileError: the file at ``mask_path`` does not fit, or none can be written there.
    """
    adapter_name = adapter_name or model.active_adapter
    config: SpftConfig = model.peft_config[adapter_name]
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.spft_values}
    if any(layer.mask(adapter_name).nnz for layer in layers.values()):
        raise SpftError(
            f"adapter `{adapter_name}` has a mask already: add a new adapter, or delete this one, to select another"
        )
    source = {"salience": config.salience, "scope": config.scope, "samples": 0, "seed": config.seed or 0}
    ranks = Ranks.current()
    # asked once for all: another rank may write the file while this one still looks for it
    path = Path(config.mask_path).expanduser() if config.mask_path else None
    found = ranks.sum_numbers(int(path is not None and path.is_file()))[0]
    if 0 < found < ranks.world:
        raise SpftFileError(
            f"`mask_path: {config.mask_path}` exists for {found} of {ranks.world} ranks only: copy the file to every "
            "node, or delete it everywhere to compute the mask anew"
        )
    if found:
        masks, source = on_every_rank(lambda: _masks_from_file(path, config, layers), ranks)
        origin = f"{config.mask_path} ({_describe(source)})"
        for name in ("salience", "scope"):
            if ranks.rank == 0 and source.get(name, getattr(config, name)) != getattr(config, name):
                warnings.warn(
                    f"`{name}: {getattr(config, name)}` is not read: the mask in {path} was made with {source[name]}; "
                    "name another `mask_path` to compute the mask anew",
                    stacklevel=3,
                )
    else:
        if path is not None:
            on_every_rank(lambda: check_mask_path(path) if ranks.rank == 0 else None, ranks)
        masks, source["samples"] = _computed_masks(model, config, layers, batches, loss_fn, ranks)
        give_back_memory()
        origin = _describe(source)
        if path is not None and ranks.rank == 0:
            _save(path, masks, source)
    install_masks(model, adapter_name, masks, source)
    check_same_mask(model, ranks, adapter_name)
    return report_masks(
        {name: (masks[name], layer.in_features) for name, layer in layers.items()}, origin, source.get("samples", 0)
    )


def on_every_rank(work: Callable[[], Any], ranks: Ranks) -> Any:
    """``work()``; an error on one rank is raised on all, where the others would wait for it at their next exchange."""
    result, failure = None, None
    try:
        result = work()
    except (SpftError, OSError) as error:
        failure = error
    failed = ranks.sum_numbers(int(failure is not None))[0]
    if failure is not None:
        raise failure
    if failed:
        raise SpftError(f"{failed} of {ranks.world} ranks failed: their messages say why")
    return result


def adapted_layers(model: nn.Module) -> dict[str, SpftLinear]:
    """The sparse layers of a `PeftModel`, by their names in the base model."""
    return spft_layers(model.base_model.model)


def install_masks(model: nn.Module, adapter_name: str, masks: Mapping[str, Mask], source: Mapping) -> None:
    """Give the adapter these masks with values of 0, and record them in its config."""
    layers = adapted_layers(model)
    for name, mask in masks.items():
        layers[name].set_mask(adapter_name, mask)
    config = model.peft_config[adapter_name]
    config.nnz = sum(mask.nnz for mask in masks.values())
    config.base_shapes = base_shapes_of({name: layers[name] for name in masks})
    config.mask_source = dict(source)
    retire_empty_values(model)


def retire_empty_values(model: nn.Module) -> None:
    """Let no parameter be without entries: DDP would wait for it, DeepSpeed can neither flatten nor gather it."""
    for layer in adapted_layers(model).values():
        layer.retire_empty_values()


def check_same_mask(model: nn.Module, ranks: Ranks, adapter_name: str | None = None) -> str:
    """Check that all ranks hold the same mask.

    Returns:
        Its checksum, of `mask_checksum`.

    Raises:
        SpftError: on every rank, when one differs.
    """
    checksum = mask_checksum(slots_of(adapted_layers(model), adapter_name or model.active_adapter))
    mine = torch.tensor([int(checksum[start : start + 8], 16) for start in range(0, 64, 8)])
    if (ranks.gather_numbers(mine) != mine).any():
        raise SpftError(
            f"the ranks hold different masks (rank {ranks.rank}: {checksum[:16]}): read the same files on every node, "
            "and the same model and seed"
        )
    return checksum


def _save(path: Path, masks: Mapping[str, Mask], source: Mapping) -> None:
    try:
        save_masks(path, masks, source)
    except (SafetensorError, OSError) as error:
        # the pass may have taken long, and every checkpoint holds the mask
        warnings.warn(f"the mask could not be saved to {path} ({error}): the run goes on without that", stacklevel=4)


def _describe(source: Mapping) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items()) or "unknown source"


def _masks_from_file(path: Path, config: SpftConfig, layers: Mapping[str, SpftLinear]) -> tuple[dict[str, Mask], dict]:
    shapes = shapes_of(layers)
    masks, source = load_masks(path, shapes, "Name another `mask_path` to compute the mask anew")
    held = sum(mask.nnz for mask in masks.values())
    asked = total_budget(list(shapes.values()), config.density, config.num_values, config.match_lora_rank)
    if held != asked:
        raise SpftFileError(
            f"mask file {path} holds {held:,} positions, but the config asks for {asked:,}: "
            f"set `num_values: {held}`, or name another `mask_path` to compute the mask anew"
        )
    return masks, source


def _computed_masks(
    model: nn.Module,
    config: SpftConfig,
    layers: Mapping[str, SpftLinear],
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    ranks: Ranks,
) -> tuple[dict[str, Mask], int]:
    """The masks, and the examples read for them."""
    gradients, read = None, 0
    if config.salience in NEEDS_GRADIENT:
        sums, read = summed_gradients(model, layers, batches, loss_fn, config.samples, ranks)
        gradients = list(sums.values())
    return _select(config, layers, gradients, ranks), read


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


def count_examples(batch: Batch) -> int:
    """The examples in a batch: rows, or with sample packing the sequences (``position_ids`` from 0) with a label."""
    tensors = {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor) and tensor.ndim}
    # of pictures and packed rows others have a row for each patch or each boundary
    text = [tensor for name, tensor in tensors.items() if name.endswith(_TEXT)]
    rows = max((len(tensor) for tensor in text or tensors.values()), default=1)
    position_ids, labels = batch.get("position_ids"), batch.get("labels")
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        sequences = (position_ids.flatten() == 0).cumsum(0)
        if isinstance(labels, Tensor) and labels.shape == position_ids.shape:
            # Axolotl's padding has positions from 0 too, but no label
            sequences = sequences[labels.flatten() != -100]
        return max(rows, len(sequences.unique()))
    return rows


def _select(
    config: SpftConfig, layers: Mapping[str, SpftLinear], gradients: list[Tensor] | None, ranks: Ranks
) -> dict[str, Mask]:
    owners = list(layers.values())
    shapes = list(shapes_of(layers).values())
    budget = (config.density, config.num_values, config.match_lora_rank)

    def score(index: int) -> Tensor:
        """This rank's rows of a matrix' scores."""
        out_features, _ = shapes[index]
        if config.salience == "gradient":
            return gradient_score(gradients[index])
        if config.salience == "balanced":
            return balanced_score(gradients[index], out_features, ranks)
        if config.salience == "magnitude":
            return magnitude_score(owners[index].read_weight()[ranks.rows(out_features)])
        return random_score(shapes[index], config.seed or 0, index)[ranks.rows(out_features)]

    if config.scope == "global":
        chosen = top_k(score, shapes, total_budget(shapes, *budget), ranks)
    else:
        chosen = []
        for index, (shape, count) in enumerate(zip(shapes, layer_budgets(shapes, *budget))):
            scores = score(index)
            if config.scope == "row":
                chosen.append(top_k_per_row(scores, shape, count, ranks))
            else:
                chosen.extend(top_k(lambda _, scores=scores: scores, [shape], count, ranks))
    return {name: mask_from_positions(positions, *shape) for name, positions, shape in zip(layers, chosen, shapes)}
