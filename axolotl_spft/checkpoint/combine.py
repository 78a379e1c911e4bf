"""Weighted sums of sparse adapters on the union of their positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta
from axolotl_spft.checkpoint.adapter_config import config_of
from axolotl_spft.checkpoint.largest import taken, threshold_of
from axolotl_spft.checkpoint.whole_tensors import common_tensors, modules_to_save
from axolotl_spft.errors import SpftFileError, listed
from axolotl_spft.ops.mask.csr import mask_from_positions, positions
from axolotl_spft.tuner.trained_on import common, dtype_name

METHODS = ("linear", "ties")


def combine(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float] | None = None,
    density: float | None = None,
    method: str = "linear",
) -> tuple[SavedAdapter, dict[str, Any]]:
    """One adapter out of several of the same base.

    ``linear``: S = sum over i of w_i S_i. ``ties``: at each position the sign of that sum is elected, and S is the mean
    of those w_i S_i that have it (TIES, Yadav et al., NeurIPS 2023, arXiv 2306.01708, without its trimming, for which
    the masks stand).

    Args:
        weights: one of each, finite; 1 by default.
        density: share of each matrix that is kept, the largest |S|; by default all of the union.

    Returns:
        the adapter; and for each module type how many positions are in how many adapters, and at how many of those in
        several the signs of w_i S_i differ.

    Raises:
        SpftFileError: they cannot be combined, or a value of S is not finite in the dtype of theirs.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights, density, method)
    others, biases = common_tensors(adapters)
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.deltas))
    deltas: dict[str, SavedDelta] = {}
    table: dict[str, dict[str, int]] = {}
    for module in modules:
        given = [(a.deltas[module], w) for a, w in zip(adapters, weights) if module in a.deltas]
        shape = _shape(module, adapters)
        at, values, counts, conflicts = _union([(*_entries(delta, shape[1]), w) for delta, w in given], method)
        originals = _originals(module, [delta for delta, _ in given], at, shape[1])
        row = table.setdefault(module.rpartition(".")[2], {"positions": 0, "shared": 0, "conflicts": 0, "kept": 0})
        row["positions"] += len(at)
        row["shared"] += int((counts > 1).sum())
        row["conflicts"] += int(conflicts.sum())
        if density is not None:
            wanted = max(1, round(density * shape[0] * shape[1]))
            if wanted < len(at):
                kept, _ = taken(values, threshold_of(values, wanted))
                at, values = at[kept], values[kept]
                originals = None if originals is None else originals[kept]
        row["kept"] += len(at)
        dtype = given[0][0].values.dtype
        for delta, _ in given[1:]:
            dtype = torch.promote_types(dtype, delta.values.dtype)
        values = values.to(dtype)
        if not torch.isfinite(values).all():
            raise SpftFileError(
                f"{module}: a value of the sum does not fit into {dtype_name(dtype)}: take smaller `weights`"
            )
        deltas[module] = SavedDelta(values, mask_from_positions(at, *shape), shape, originals)
    known = all(any(a.has_shapes for a in adapters if module in a.deltas) for module in modules)
    first = adapters[0].config
    source = {"sum of": [a.mask_source for a in adapters], "weights": weights, "method": method}
    source = source if len(adapters) > 1 else dict(adapters[0].mask_source)
    if repaired := sum(delta.mask.nnz for delta in deltas.values() if delta.originals is not None):
        source["repaired"] = repaired
    config = config_of(
        deltas,
        source,
        first.get("base_model_name_or_path"),
        task_type=first.get("task_type"),
        modules_to_save=modules_to_save([each.config for each in adapters]),
        target_parameters=[name for a in adapters for name in a.config.get("target_parameters") or ()],
    )
    config["bias"] = first.get("bias", "none")
    revisions = {adapter.config.get("revision") for adapter in adapters}
    config["revision"] = revisions.pop() if len(revisions) == 1 else None
    if list(deltas) == list(adapters[0].deltas):
        config["base_shapes"] = first.get("base_shapes")
    # of another mask than the first one's the config tells where it is from
    record = adapters[0].record if len(adapters) == 1 and density is None else _ties(deltas, adapters)
    record = {**record, "trained_on": common(adapter.record.get("trained_on", {}) for adapter in adapters)}
    return SavedAdapter(config, deltas, others, record, known, biases), {
        "values": sum(delta.mask.nnz for delta in deltas.values()),
        "modules": table,
    }


def _check(adapters: Sequence[SavedAdapter], weights: Sequence[float], density: float | None, method: str) -> None:
    if len(weights) != len(adapters):
        raise SpftFileError(f"there are {len(adapters)} adapters, but {len(weights)} weights: give one for each")
    if not all(isfinite(weight) for weight in weights):
        raise SpftFileError(f"`weights {', '.join(map(str, weights))}` must be finite numbers: correct them")
    if method not in METHODS:
        raise SpftFileError(f"`method {method}` must be one of {', '.join(METHODS)}")
    if density is not None and not 0 < density <= 1:
        raise SpftFileError(f"`density {density}` must be in (0, 1]")


def _originals(module: str, deltas: Sequence[SavedDelta], at: Tensor, in_features: int) -> Tensor | None:
    """What the weight was before quantization at the positions ``at`` of all deltas; None where none tells it."""
    given = [delta for delta in deltas if delta.originals is not None]
    if not given:
        return None
    if len(given) < len(deltas):
        raise SpftFileError(
            f"{module}: some of the adapters repair a quantized base and some do not, and no file has the entries of "
            "the base that a sum of both needs: load them on the base and call add_weighted_adapter()"
        )
    dtype = given[0].originals.dtype
    for delta in given[1:]:
        dtype = torch.promote_types(dtype, delta.originals.dtype)
    originals = torch.zeros(len(at), dtype=dtype)
    # where two have the same entry, the more exact one stays
    for delta in sorted(given, key=lambda each: each.originals.dtype.itemsize):
        originals[torch.searchsorted(at, positions(delta.mask, in_features))] = delta.originals.to(dtype)
    for delta in given:
        own = originals[torch.searchsorted(at, positions(delta.mask, in_features))]
        if not torch.equal(own.to(delta.originals.dtype), delta.originals):
            raise SpftFileError(f"{module}: the adapters repair different base models: combine adapters of one base")
    return originals


def _ties(modules: Iterable[str], adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
    """What the adapters record of tied modules, as a part of the sum's record."""
    found: dict[str, list[str]] = {}
    for module in modules:
        given = [
            each.record["tied"].get(module, []) for each in adapters if module in each.deltas and "tied" in each.record
        ]
        if any(set(each) != set(given[0]) for each in given):
            most = max(given, key=len)
            raise SpftFileError(
                f"{module} is one weight with {listed(most)} for one of the adapters and not for "
                "another: combine adapters of one base"
            )
        if given and given[0]:
            found[module] = given[0]
    return {"tied": found} if all("tied" in each.record for each in adapters) or found else {}


def _shape(module: str, adapters: Sequence[SavedAdapter]) -> tuple[int, int]:
    known = {a.deltas[module].shape for a in adapters if module in a.deltas and a.has_shapes}
    guessed = [a.deltas[module].shape for a in adapters if module in a.deltas and not a.has_shapes]
    rows = {shape[0] for shape in (*known, *guessed)}
    if len(known) > 1 or len(rows) > 1:
        raise SpftFileError(f"{module} has the shapes {sorted(known) or sorted(guessed)}: combine adapters of one base")
    columns = next(iter(known))[1] if known else max(shape[1] for shape in guessed)
    if any(shape[1] > columns for shape in guessed):
        raise SpftFileError(f"{module} has more columns in one adapter than in another: combine adapters of one base")
    return rows.pop(), columns


def _entries(delta: SavedDelta, in_features: int) -> tuple[Tensor, Tensor]:
    return positions(delta.mask, in_features), delta.values.double()


def _union(given: list[tuple[Tensor, Tensor, float]], method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of all (positions, values, weight), what they become, how many had each, and where signs differ."""
    at, inverse = torch.cat([positions for positions, _, _ in given]).unique(return_inverse=True)
    parts = torch.cat([values * weight for _, values, weight in given])

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(at), dtype=torch.float64).index_add_(0, inverse, values)

    counts = summed(torch.ones_like(parts))
    total = summed(parts)
    conflicts = (summed((parts > 0).double()) > 0) & (summed((parts < 0).double()) > 0)
    if method == "ties":
        agree = (parts.sign() == total.sign()[inverse]) & (parts != 0)
        total = summed(parts * agree) / summed(agree.double()).clamp(min=1)
    return at, total, counts, conflicts
