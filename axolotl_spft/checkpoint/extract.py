"""A sparse adapter out of a fully fine-tuned checkpoint: its largest differences from the base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta
from axolotl_spft.checkpoint.adapter_config import config_of
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.largest import taken, threshold, threshold_of
from axolotl_spft.checkpoint.shards import find_checkpoint
from axolotl_spft.checkpoint.skeleton import linear_shapes, skeleton
from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.ops.weight.scatter import rounded_sum
from axolotl_spft.tuner.trained_on import base_of


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    density: float,
    scope: str = "layer",
    trust_remote_code: bool = False,
) -> tuple[SavedAdapter, dict[str, Any]]:
    """The adapter S with the largest entries of |T - B|, one matrix in memory at a time.

    B and T are the weights (out_features, in_features) of every linear module but the output embedding. A value is
    such that B + S rounds to T in the dtype of B. Modules of another kind that differ are kept whole
    (``modules_to_save``), so that at density 1 the tuned model is rebuilt.

    Args:
        density: share of the entries that is kept; entries that are equal are never.
        scope: ``layer``: the largest of each matrix. ``global``: the largest of all.

    Returns:
        the adapter; and the error that it leaves, ||T - B - S|| / ||T - B|| over all matrices.

    Raises:
        SpftFileError: one of them is no unquantized checkpoint, or they differ in more than their values.
    """
    if not 0 < density <= 1:
        raise SpftFileError(f"`density {density}` must be in (0, 1]")
    folders = [find_checkpoint(each) for each in (base, tuned)]
    model = skeleton(folders[0], trust_remote_code=trust_remote_code)
    first, second = (BaseCheckpoint(folder, model) for folder in folders)
    modules = _linear_modules(model, first)
    _check_alike(first, second)
    limit = None
    if scope == "global":
        entries = sum(rows * columns for rows, columns in modules.values())

        def differences() -> Iterator[Tensor]:
            for module in tqdm(modules, desc="Comparing", unit="matrix"):
                yield _difference(first, second, module)

        limit = threshold(differences, max(1, round(density * entries)))
    deltas, moved, left = {}, 0.0, 0.0
    for module, shape in tqdm(modules.items(), desc="Extracting", unit="matrix"):
        difference = _difference(first, second, module)
        own = threshold_of(difference, max(1, round(density * difference.numel()))) if limit is None else limit
        positions, rest = taken(difference, own)
        limit = rest if limit is not None else None
        before, after = (each.read_matrix(module).flatten()[positions] for each in (first, second))
        kept = float(difference.view(-1)[positions].square().sum())
        moved += (all_of := float(difference.square().sum()))
        left += max(all_of - kept, 0.0) if len(positions) < int((difference != 0).sum()) else 0.0
        if len(positions):
            mask = mask_from_positions(positions, *shape)
            deltas[module] = SavedDelta(values_between(before, after), mask, shape)
    if not deltas:
        raise SpftFileError(f"the linear layers of {tuned} are those of {base}: there is nothing to extract")
    others, not_kept = _other_differences(model, first, second, set(modules))
    whole = sorted({name.rpartition(".")[0] for name in others})
    config = config_of(
        deltas,
        {"extracted from": str(tuned), "density": density, "scope": scope},
        str(base),
        in_model_order=True,
        modules_to_save=whole,
    )
    report = {
        "values": sum(delta.mask.nnz for delta in deltas.values()),
        "density": sum(delta.mask.nnz for delta in deltas.values()) / sum(r * c for r, c in modules.values()),
        "matrices": len(deltas),
        "error_left": sqrt(left / moved) if moved else 0.0,
        "modules_kept_whole": whole,
        "parameters_not_kept": not_kept,
    }
    # the sum is that of the base as it is
    record = {"trained_on": base_of(first.read_matrix(next(iter(modules))).dtype)}
    return SavedAdapter(config, deltas, others, record), report


def values_between(before: Tensor, after: Tensor) -> Tensor:
    """Values such that before + values is ``after``, both rounded to the dtype of ``before``.

    They are ``after - before`` in float32 where that is enough, else in float64.
    """
    exact = after.double() - before.double()
    values = exact.float()
    return values if torch.equal(rounded_sum(before, values), after.to(before.dtype)) else exact


def _linear_modules(model: nn.Module, checkpoint: BaseCheckpoint) -> dict[str, tuple[int, int]]:
    output = model.get_output_embeddings()
    return {
        name: shape
        for name, shape in linear_shapes(model).items()
        if model.get_submodule(name) is not output and checkpoint.has(name)
    }


def _check_alike(first: BaseCheckpoint, second: BaseCheckpoint) -> None:
    def described(checkpoint: BaseCheckpoint) -> dict[str, tuple]:
        shards, groups = checkpoint.shards, checkpoint.keys.group_of
        return {name: tuple(shards.shape(key) for key in group.keys) for name, group in groups.items()}

    one, two = described(first), described(second)
    wrong = [name for name in one | two if one.get(name) != two.get(name)]
    if wrong:
        raise SpftFileError(
            f"{first.shards.folder} and {second.shards.folder} have different tensors ({first_of(wrong, ', ')}): name "
            "a model and what full fine-tuning made of it, saved alike"
        )


def _difference(first: BaseCheckpoint, second: BaseCheckpoint, module: str) -> Tensor:
    return second.read_matrix(module).double() - first.read_matrix(module).double()


def _other_differences(
    model: nn.Module, first: BaseCheckpoint, second: BaseCheckpoint, modules: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Parameters outside the adapted matrices that differ: those that PEFT can keep whole, and names of the others."""
    owners = {name for name, module in model.named_modules() if not list(module.children())}
    weights = {f"{module}.weight" for module in modules}
    changed = [
        name
        for name in first.keys.group_of
        if name not in weights and not torch.equal(first.read_parameter(name), second.read_parameter(name))
    ]
    kept = {name.rpartition(".")[0] for name in changed if name.rpartition(".")[0] in owners - modules}
    others = {name: second.read_parameter(name) for name in first.keys.group_of if name.rpartition(".")[0] in kept}
    # PEFT trains and loads a module as a copy of its own, which parts from what it is tied to
    others |= {
        name: others[other]
        for name, other in first.keys.tied.items()
        if other in others and name.rpartition(".")[0] in owners
    }
    return others, [name for name in changed if name not in others]
