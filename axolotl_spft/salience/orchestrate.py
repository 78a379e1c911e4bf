"""`select_mask`: from an empty adapter to one with the most salient positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.ranks import Ranks, on_every_rank
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.salience.blocks import is_of_blocks
from axolotl_spft.salience.compute import compute_masks
from axolotl_spft.salience.examples import Batch
from axolotl_spft.salience.install import adapted_layers, check_same_mask, install_masks
from axolotl_spft.salience.mask_file import check_mask_path, load_masks, save_masks
from axolotl_spft.salience.release import give_back_memory
from axolotl_spft.salience.repair import REPAIRED, Repair, open_repair
from axolotl_spft.salience.report import MaskReport, report_masks
from axolotl_spft.salience.untrained import frozen_by_the_run, note_on_frozen
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of
from axolotl_spft.tuner.targets import check_is_peft_model

_STILL_REPAIRED = " (its values begin at the unquantized weights all the same)"
_STILL_AT_0 = " (its values begin at 0 all the same)"
# recorded where they are set
_OF_SHARES = ("density_pattern", "min_density", "max_density", "score_after", "repair")


@torch.inference_mode(False)
def select_mask(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    adapter_name: str | None = None,
    learning_rate: float | None = None,
) -> MaskReport:
    """Choose the positions that an empty adapter trains, and put values of 0 there: deviations from the weight.

    With the option ``repair`` that is the weight from before quantization, which takes the place of a quantized one at
    these positions.

    The adapter's `SpftConfig` says how: salience, scope, budget, samples, seed, mask_path. Most saliences sum what they
    need of the loss' gradients over batches until ``samples`` examples are read. Nothing else is changed: random
    generators, gradients, modes, hooks and ``requires_grad`` are afterwards as before. Make the optimizer afterwards.

    Args:
        model: a `PeftModel` with an SPFT adapter.
        batches: dicts for ``model(**batch)`` on the model's device; not read (and may be None) where ``mask_path``
            names a file. Where the salience needs none, they tell which matrices the loss uses, mostly the first batch
            alone, and may be None too, except with ``repair``. The salience ``grasp`` reads them twice.
        loss_fn: the loss of (model, batch), a scalar; ``model(**batch).loss`` by default.
        adapter_name: the active adapter by default.
        learning_rate: of the run; read by the warm-up of the option ``score_after``, which trains a step on each batch,
            or on ``batches.batches_per_step`` of them where there is such an attribute.

    Returns:
        What was selected; ``str(report)`` is a table.

    Raises:
        SpftError: the model is no `PeftModel` with such a sparse adapter, the adapter has a mask already, there are no
            batches or no loss, a gradient or score is not finite, the salience does not suit the model.
        SpftFileError: the file at ``mask_path`` does not fit, or none can be written there.
    """
    check_is_peft_model(model)
    adapter_name = adapter_name or model.active_adapter
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SpftConfig):
        held = ", ".join(f"`{name}` ({each.peft_type.value})" for name, each in model.peft_config.items())
        raise SpftError(
            f"select_mask: `{adapter_name}` is no sparse adapter of this model, which has {held}: name one of "
            "SpftConfig, or make it with `peft.get_peft_model(model, SpftConfig(...))`"
        )
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.spft_values}
    if any(layer.mask(adapter_name).nnz for layer in layers.values()):
        raise SpftError(
            f"adapter `{adapter_name}` has a mask already: add a new adapter, or delete this one, to select another"
        )
    source = {"salience": config.salience, "scope": config.scope, "samples": 0, "seed": config.seed or 0}
    source |= {name: getattr(config, name) for name in _OF_SHARES if getattr(config, name)}
    if config.block is not None:
        source["block_size"] = list(config.block)
    if config.salience == "lift":
        source["lift_rank"] = config.lift_rank
    ranks = Ranks.current()
    # asked once for all: another rank may write the file while this one still looks for it
    path = Path(config.mask_path).expanduser() if config.mask_path else None
    found = ranks.sum_numbers(int(path is not None and path.is_file()))[0]
    if 0 < found < ranks.world:
        raise SpftFileError(
            f"`mask_path: {config.mask_path}` exists for {found} of {ranks.world} ranks only: copy the file to every "
            "node, or delete it everywhere to compute the mask anew"
        )
    notes: list[str] = []
    untrained: list[str] = []
    repair, unrepaired = None, []
    if config.repair:
        repair, unrepaired = open_repair(model.base_model.model, config, layers, ranks)
    if found:
        masks, source = on_every_rank(lambda: _masks_from_file(path, config, layers), ranks)
        origin = f"{config.mask_path} ({_describe(source)})"
        notes = note_on_frozen(masks, frozen_by_the_run(layers, adapter_name), config.mask_path)
        for name, mask in masks.items() if repair is not None else ():
            repair.keep(name, positions(mask, layers[name].in_features).cpu())
        for name, made_with in _other_options(config, source) if ranks.rank == 0 else ():
            warnings.warn(
                f"`{name}: {getattr(config, name)}` is not read: the mask in {path} was made "
                f"{'without' if made_with is None else f'with {made_with}'}; name another `mask_path` to "
                "compute the mask anew"
                + ("" if name != "repair" else _STILL_AT_0 if repair is None else _STILL_REPAIRED),
                stacklevel=3,
            )
    else:
        if path is not None:
            on_every_rank(lambda: check_mask_path(path) if ranks.rank == 0 else None, ranks)
        masks, record, notes, untrained = compute_masks(
            model, config, layers, adapter_name, batches, loss_fn, ranks, learning_rate, repair
        )
        source |= record
        give_back_memory()
        origin = _describe(source)
        if path is not None and ranks.rank == 0:
            _save(path, masks, shapes_of(layers), source)
    notes = [*notes, *unrepaired]
    if notes and ranks.rank == 0:
        warnings.warn(" ".join(notes), stacklevel=3)
    if repair is not None:
        source = {**source, **repair.record()}
    install_masks(model, adapter_name, masks, source, None if repair is None else repair.originals)
    check_same_mask(model, ranks, adapter_name)
    return report_masks(
        {name: (masks[name], layer.in_features) for name, layer in layers.items()},
        origin,
        source.get("samples", 0),
        [*notes, *_notes_on_budget(config, layers, masks), *_notes_on_repair(repair)],
        untrained,
        None if repair is None else repair.errors,
        bool(repair and repair.squares),
    )


def _other_options(config: SpftConfig, source: Mapping) -> list[tuple[str, Any]]:
    """The options with which a mask of this record was made otherwise than the config says, and what they were."""
    if "salience" not in source:
        return []
    others = [
        (name, source[name])
        for name in ("salience", "scope", "lift_rank")
        if name in source and source[name] != getattr(config, name)
    ]
    # recorded where they are set alone
    others += [
        (name, source.get(name)) for name in _OF_SHARES if (source.get(name) or None) != (getattr(config, name) or None)
    ]
    return others


def _notes_on_budget(config: SpftConfig, layers: Mapping[str, SparseLayer], masks: Mapping[str, Mask]) -> list[str]:
    held, asked = sum(mask.nnz for mask in masks.values()), config.allowed_counts(shapes_of(layers))[-1]
    if held == asked:
        return []
    return [f"{asked - held:,} of the {asked:,} values of the budget are left, in which no whole block fits"]


def _notes_on_repair(repair: Repair | None) -> list[str]:
    if repair is None or not repair.counts or any(repair.counts.values()):
        return []
    return [
        f"`repair: {repair.share}` of the few values of each matrix is less than one, so that none was chosen by its "
        "quantization error (all begin at the unquantized weights all the same): ask for more values, or a larger share"
    ]


def _save(path: Path, masks: Mapping[str, Mask], shapes: Mapping[str, tuple[int, int]], source: Mapping) -> None:
    try:
        save_masks(path, masks, shapes, source)
    except (SafetensorError, OSError) as error:
        # the pass may have taken long, and every checkpoint holds the mask
        warnings.warn(f"the mask could not be saved to {path} ({error}): the run goes on without that", stacklevel=4)


def _describe(source: Mapping) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items()) or "unknown source"


def _masks_from_file(path: Path, config: SpftConfig, layers: Mapping[str, SparseLayer]) -> tuple[dict[str, Mask], dict]:
    shapes = shapes_of(layers)
    masks, source = load_masks(path, shapes, "Name another `mask_path` to compute the mask anew")
    # of the adapter whose mask it was
    source = {key: value for key, value in source.items() if key not in REPAIRED}
    held = sum(mask.nnz for mask in masks.values())
    asked = config.allowed_counts(shapes)
    if held not in asked:
        raise SpftFileError(
            f"mask file {path} holds {held:,} positions, but the config asks for {asked[-1]:,}: "
            f"set `num_values: {held}`, or name another `mask_path` to compute the mask anew"
        )
    torn = [name for name, mask in masks.items() if config.block and not is_of_blocks(mask, shapes[name], config.block)]
    if torn:
        raise SpftFileError(
            f"the mask in {path} is not made of whole blocks of `block_size: {list(config.block)}` (see {torn[0]}): "
            "write the size it was made with, or name another `mask_path` to compute the mask anew"
        )
    return masks, source
