"""`select_mask`: from an empty adapter to one with the most salient positions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.ops.csr import Mask, mask_from_positions
from axolotl_spft.salience.collect import gathered_gradients
from axolotl_spft.salience.mask_file import load_masks, save_masks
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
from axolotl_spft.tuner.state import base_shapes_of, spft_layers

Batch = Mapping[str, Any]


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
        SpftFileError: the file at ``mask_path`` does not fit.
    """
    adapter_name = adapter_name or model.active_adapter
    config: SpftConfig = model.peft_config[adapter_name]
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.spft_values}
    if any(layer.mask(adapter_name).nnz for layer in layers.values()):
        raise SpftError(
            f"adapter `{adapter_name}` has a mask already: add a new adapter, or delete this one, to select another"
        )
    source = {"salience": config.salience, "scope": config.scope, "samples": 0, "seed": config.seed or 0}
    if config.mask_path and Path(config.mask_path).is_file():
        masks, source = _masks_from_file(config, layers)
        origin = f"{config.mask_path} ({_describe(source)})"
    else:
        scores = None
        if config.salience in NEEDS_GRADIENT:
            sums, source["samples"] = _summed_gradients(model, layers, batches, loss_fn, config.samples)
            scores = list(sums.values())
        masks = _select(config, layers, scores)
        origin = _describe(source)
        if config.mask_path and _is_main_process():
            save_masks(config.mask_path, masks, source)
    install_masks(model, adapter_name, masks, source)
    return report_masks(
        {name: (masks[name], layer.in_features) for name, layer in layers.items()}, origin, source.get("samples", 0)
    )


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


def _describe(source: Mapping) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items()) or "unknown source"


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _shapes(layers: Mapping[str, SpftLinear]) -> dict[str, tuple[int, int]]:
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _masks_from_file(config: SpftConfig, layers: Mapping[str, SpftLinear]) -> tuple[dict[str, Mask], dict]:
    shapes = _shapes(layers)
    masks, source = load_masks(config.mask_path, shapes)
    held = sum(mask.nnz for mask in masks.values())
    asked = total_budget(list(shapes.values()), config.density, config.num_values, config.match_lora_rank)
    if held != asked:
        raise SpftFileError(
            f"mask file {config.mask_path} holds {held:,} positions, but the config asks for {asked:,}: "
            f"set `num_values: {held}`, or delete the file to compute the mask anew"
        )
    return masks, source


def _summed_gradients(
    model: nn.Module,
    layers: Mapping[str, SpftLinear],
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None,
    samples: int,
) -> tuple[dict[str, Tensor], int]:
    read = 0
    with (
        untouched_rng(),
        untouched_model(model),
        gathered_gradients(model, layers) as sums,
        tqdm(total=samples, desc="Salience", unit="example", disable=not _is_main_process()) as bar,
        torch.enable_grad(),
    ):
        for batch in batches or ():
            loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
            if loss is None:
                raise SpftError("the model gave no loss: put `labels` into the batches, or pass `loss_fn`")
            loss.backward()
            count = count_examples(batch)
            read += count
            bar.update(min(count, samples - bar.n))
            if read >= samples:
                break
    if not read:
        raise SpftError("the salience pass found no batches: give at least one, or use `salience: magnitude`")
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise SpftError(
                f"the gradient of {name} is not finite on the sample: check the data and the precision of the run"
            )
    return sums, read


def count_examples(batch: Batch) -> int:
    """The examples in a batch: rows, or with sample packing the sequences that start (``position_ids`` 0)."""
    position_ids = batch.get("position_ids")
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        return max(1, int((position_ids == 0).sum()))
    return max((tensor.shape[0] for tensor in batch.values() if isinstance(tensor, Tensor) and tensor.ndim), default=1)


def _select(config: SpftConfig, layers: Mapping[str, SpftLinear], gradients: list[Tensor] | None) -> dict[str, Mask]:
    owners = list(layers.values())
    shapes = list(_shapes(layers).values())
    budget = (config.density, config.num_values, config.match_lora_rank)

    def score(index: int) -> Tensor:
        if config.salience == "gradient":
            return gradient_score(gradients[index])
        if config.salience == "balanced":
            return balanced_score(gradients[index])
        if config.salience == "magnitude":
            return magnitude_score(owners[index].read_weight())
        return random_score(shapes[index], config.seed or 0, index)

    if config.scope == "global":
        chosen = top_k(score, len(owners), total_budget(shapes, *budget))
    else:
        chosen = []
        for index, count in enumerate(layer_budgets(shapes, *budget)):
            scores = score(index)
            if config.scope == "row":
                chosen.append(top_k_per_row(scores, count))
            else:
                chosen.extend(top_k(lambda _, scores=scores: scores, 1, count))
    return {name: mask_from_positions(positions, *shape) for name, positions, shape in zip(layers, chosen, shapes)}
