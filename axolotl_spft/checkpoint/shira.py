"""PEFT's SHiRA adapters (Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175), read and written as ours.

A SHiRA file has ``<module>.shira_weight`` (n) and ``<module>.shira_indices`` (2, n; int32: rows, columns) with
n = r (out_features + in_features), for the same r in every matrix. So what a sparse adapter has less than that is
filled up with zeros. The shapes are not in the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from math import ceil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from axolotl_spft.checkpoint.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedAdapter,
    SavedDelta,
    read_json_object,
    write_files,
)
from axolotl_spft.checkpoint.adapter_config import config_of
from axolotl_spft.errors import SpftFileError, listed
from axolotl_spft.files import check_safetensors
from axolotl_spft.ops.mask.csr import mask_from_positions, positions

_PREFIX, _WEIGHT, _INDICES = "base_model.model.", ".shira_weight", ".shira_indices"


def read_shira(folder: str | os.PathLike, shapes: Mapping[str, tuple[int, int]] | None = None) -> SavedAdapter:
    """A saved SHiRA adapter as a sparse one, value by value.

    Args:
        shapes: module name -> (out_features, in_features); without them the least that fit.

    Raises:
        SpftFileError: it is damaged, or has no indices, as files of a custom mask without them.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_FILE, "name the folder of a saved adapter")
    path = folder / WEIGHTS_FILE
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    deltas = {}
    for name in [key.removesuffix(_WEIGHT) for key in tensors if key.endswith(_WEIGHT)]:
        values, indices = tensors.pop(name + _WEIGHT), tensors.pop(name + _INDICES, None)
        if indices is None:
            raise SpftFileError(f"{path}: {name} has no shira_indices, without which the values have no place")
        if indices.shape != (2, len(values)):
            raise SpftFileError(f"{path}: {name} has {len(values)} values, but indices of {tuple(indices.shape)}")
        rows, columns = indices.to(torch.int64)
        shape = (shapes or {}).get(name) or (int(rows.max()) + 1, int(columns.max()) + 1)
        if rows.min() < 0 or columns.min() < 0 or rows.max() >= shape[0] or columns.max() >= shape[1]:
            raise SpftFileError(f"{path}: {name} has an index outside of {shape}: name the base model of the adapter")
        at, order = (rows * shape[1] + columns).sort()
        if (at.diff() == 0).any():
            raise SpftFileError(f"{path}: {name} has an index twice")
        deltas[name] = SavedDelta(values[order], mask_from_positions(at, *shape), shape)
    if not deltas:
        raise SpftFileError(f"{path} holds no values of SHiRA")
    made = config_of(
        deltas,
        {"converted from": "SHiRA"},
        config.get("base_model_name_or_path"),
        shapes is not None,
        task_type=config.get("task_type"),
        modules_to_save=config.get("modules_to_save") or (),
    )
    made["revision"] = config.get("revision")
    return SavedAdapter(made, deltas, tensors, {}, shapes is not None)


def write_shira(
    folder: str | os.PathLike, adapter: SavedAdapter, linear: Collection[str] | None = None
) -> dict[str, int]:
    """Write a sparse adapter as one of SHiRA, which computes the same.

    Args:
        linear: the names of the base model's linear layers, which SHiRA adapts alone; None where they are not known.

    Returns:
        its rank, its values, and how many zeros were added.

    Raises:
        SpftFileError: the shapes are not known, SHiRA does not adapt one of the modules, a matrix is too full for its
            rule, or nothing can be written.
    """
    if adapter.repaired:
        raise SpftFileError(
            "the adapter repairs a quantized base, by entries that take the place of the base's, and SHiRA can only "
            "add to these: merge it (`axolotl spft merge`)"
        )
    if adapter.config.get("target_parameters"):
        raise SpftFileError(
            f"the adapter trained `target_parameters: {adapter.config['target_parameters']}`, and SHiRA adapts modules "
            "alone: merge it (`axolotl spft merge`)"
        )
    for name in adapter.deltas:
        together = (adapter.record.get("tied") or {}).get(name)
        if together:
            raise SpftFileError(
                f"{name} is one weight with {listed(together)}, and SHiRA would adapt one of them alone: merge it "
                "(`axolotl spft merge`)"
            )
        if linear is not None and name not in linear:
            raise SpftFileError(
                f"{name} is no linear layer of torch (but an embedding, or a Conv1D of GPT-2), and SHiRA adapts these "
                "alone: merge it (`axolotl spft merge`)"
            )
    if not adapter.has_shapes:
        raise SpftFileError("the adapter's file does not have the shapes of its modules: add `--base`")
    if adapter.biases:
        raise SpftFileError("the adapter holds biases (`bias: all`), which SHiRA has no place for: merge it instead")
    rank = max(1, *(ceil(each.mask.nnz / sum(each.shape)) for each in adapter.deltas.values()))
    tensors = {_PREFIX + name: tensor for name, tensor in adapter.others.items()}
    added = 0
    for name, delta in adapter.deltas.items():
        rows, columns = delta.shape
        wanted = rank * (rows + columns)
        if wanted > rows * columns:
            raise SpftFileError(
                f"{name} ({rows}, {columns}) would need {wanted} entries: SHiRA trains r (out_features + in_features) "
                f"in every matrix, here with r = {rank} because of the fullest one"
            )
        at, values = _filled(positions(delta.mask, columns), delta.values.float(), wanted, rows * columns)
        added += wanted - delta.mask.nnz
        tensors[f"{_PREFIX}{name}{_WEIGHT}"] = values
        tensors[f"{_PREFIX}{name}{_INDICES}"] = torch.stack([at // columns, at % columns]).to(torch.int32)
    write_files(folder, tensors, _shira_config(adapter, rank))
    return {"rank": rank, "values": adapter.nnz, "zeros_added": added}


def _filled(at: Tensor, values: Tensor, wanted: int, entries: int) -> tuple[Tensor, Tensor]:
    """As many entries as wanted: the first free positions get zeros."""
    missing = wanted - len(at)
    candidates = torch.arange(min(entries, wanted))
    free = candidates[~torch.isin(candidates, at)][:missing]
    every, order = torch.cat([at, free]).sort()
    return every, torch.cat([values, torch.zeros(missing)])[order]


def _shira_config(adapter: SavedAdapter, rank: int) -> dict:
    from peft import ShiraConfig

    config = ShiraConfig(
        r=rank,
        target_modules=list(adapter.deltas),
        modules_to_save=adapter.config.get("modules_to_save"),
        base_model_name_or_path=adapter.config.get("base_model_name_or_path"),
        task_type=adapter.config.get("task_type"),
        inference_mode=True,
    ).to_dict()
    config.pop("mask_fn", None)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
