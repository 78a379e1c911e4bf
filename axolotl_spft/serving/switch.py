"""Applies saved adapters to a plain module in place, and takes them off again with the bits of before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from axolotl_spft.checkpoint.adapter import SavedAdapter, read_adapter
from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.ops.mask.csr import row_indices
from axolotl_spft.serving.places import Place, check_ties, check_trained_whole, find_place
from axolotl_spft.tuner.expert_targets import is_of_experts

_APPLIED = "_spft_applied"


class _Write(NamedTuple):
    """New entries of a weight: at ``rows`` and ``columns`` (n; int64), ``values`` (n) are added; None: all replaced."""

    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    values: Tensor

    def write(self) -> Tensor:
        """Write them, and return what stood there."""
        with _writing(self.weight):
            if self.rows is None:
                before = self.weight.clone()
                self.weight.copy_(self.values)
            else:
                before = self.weight[self.rows, self.columns]
                # rounded once
                self.weight[self.rows, self.columns] = torch.add(before, self.values, out=torch.empty_like(before))
        return before

    def restore(self, before: Tensor) -> None:
        with _writing(self.weight):
            if self.rows is None:
                self.weight.copy_(before)
            else:
                self.weight[self.rows, self.columns] = before


class Applied:
    """An adapter that is applied to a model; `revert` takes it off.

    It holds, for each entry that it changed, the entry of before and its place: 18 bytes a value on a bf16 model.
    """

    def __init__(self, model: nn.Module, writes: list[_Write]):
        self._model, self._writes = model, writes
        self._before = [each.write() for each in writes]
        model.__dict__.setdefault(_APPLIED, []).append(self)

    def revert(self) -> None:
        """Put every entry back, bit for bit.

        Raises:
            SpftError: it is not applied any more, or another adapter was applied after it.
        """
        applied = self._model.__dict__.get(_APPLIED, [])
        if not applied or applied[-1] is not self:
            raise SpftError(
                "the adapter is not the last one that was applied to this model: revert those after it first, the last "
                "one before the others"
            )
        for each, before in zip(reversed(self._writes), reversed(self._before)):
            each.restore(before)
        applied.pop()


def apply_adapter(
    model: nn.Module, adapter: SavedAdapter | str | os.PathLike, rank: int = 0, ranks: int = 1, partial: bool = False
) -> Applied:
    """W becomes W + S in the weights of ``model``, rounded once to their dtype, without PEFT.

    Modules are found by name; of the fused ``qkv_proj`` and ``gate_up_proj`` the rows of the part are, and under tensor
    parallelism what this rank holds. Tensors stay where they are in memory, so captured CUDA graphs stay valid; what an
    engine has cached of earlier answers does not.

    Args:
        model: any module with plain weights of 16 or 32 bits, each (out_features, in_features) or a part of that.
        adapter: a saved adapter's folder, or what `read_adapter` made of it.
        rank, ranks: of tensor parallelism.
        partial: whether modules that ``model`` has not are passed over, as those of other pipeline stages are.

    Raises:
        SpftFileError: the folder holds no sparse adapter, or a damaged one.
        SpftError: a module is not there, is quantized or has another shape; nothing is changed then.
    """
    if not isinstance(adapter, SavedAdapter):
        adapter = read_adapter(adapter)
    if not adapter.has_shapes and ranks > 1:
        raise SpftError("the adapter's file has no shapes, which tensor parallelism needs: save the adapter again")
    writes, absent = _planned(model, adapter, rank, ranks)
    if absent and not (partial and writes):
        experts = [name for name in absent if is_of_experts(name)]
        if experts:
            raise SpftError(
                f"{first_of(experts, ', ')}: the adapter trained experts that are one parameter, which is no module to "
                "switch an adapter on, and which engines store in their own way: serve the merged model (`axolotl spft "
                "merge`)"
            )
        raise SpftError(
            f"the model has no {first_of(absent, ', ')}: apply the adapter to the base model that it was trained on"
        )
    return Applied(model, writes)


def _planned(model: nn.Module, adapter: SavedAdapter, rank: int, ranks: int) -> tuple[list[_Write], list[str]]:
    """Every change, none made yet; and what the model has no place for."""
    writes, absent, weights, under = [], [], {}, []
    embeddings = adapter.embeddings
    shapes = {name: delta.shape for name, delta in adapter.deltas.items()}
    modules = dict(model.named_modules())
    for name, delta in adapter.deltas.items():
        place = find_place(modules, name, shapes, rank, ranks, exact=adapter.has_shapes)
        if place is None:
            absent.append(name)
            continue
        weights[name] = place.weight
        device = place.weight.device
        under += _grown(embeddings.get(f"{name}.weight"), place)
        rows, columns = row_indices(delta.mask.row_offsets, delta.mask.nnz), delta.mask.columns
        rows, columns = rows.to(device, torch.int64), columns.to(device, torch.int64)
        here = (rows >= place.rows.start) & (rows < place.rows.stop)
        here &= (columns >= place.columns.start) & (columns < place.columns.stop)
        rows = rows[here] - place.rows.start + place.first_row
        columns = columns[here] - place.columns.start
        writes.append(_Write(place.weight, rows, columns, delta.values.to(device)[here]))
    if "tied" in adapter.record:
        check_ties(modules, weights, adapter.record["tied"])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_trained_whole(parameters, adapter.others)
    for name, tensor in adapter.whole.items():
        parameter = parameters.get(name)
        if parameter is None:
            absent.append(name)
        elif parameter.shape != tensor.shape:
            raise SpftError(
                f"{name} was trained whole, {tuple(tensor.shape)}, but is {tuple(parameter.shape)} here: an engine "
                "that pads or divides it cannot switch it, so serve the merged model"
            )
        else:
            writes.append(_Write(parameter.data, None, None, tensor.to(parameter)))
    return under + writes, absent


def _grown(saved: Tensor | None, place: Place) -> list[_Write]:
    """The change under a delta where the adapter has a weight of its own, and another: embeddings may have grown."""
    if saved is None:
        return []
    present = place.weight[place.first_row : place.first_row + len(place.rows)]
    part = saved[place.rows.start : place.rows.stop, place.columns.start : place.columns.stop].to(present)
    return [] if torch.equal(part, present) else [_Write(present, None, None, part)]


@contextmanager
def _writing(weight: Tensor) -> Iterator[None]:
    # a tensor made in inference mode may be changed in it alone
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield


class Switch:
    """Adapters by name, of which one at a time is applied to a model.

    Args:
        model, rank, ranks, partial: of `apply_adapter`.
    """

    def __init__(self, model: nn.Module, rank: int = 0, ranks: int = 1, partial: bool = False):
        self.model, self.rank, self.ranks, self.partial = model, rank, ranks, partial
        self.adapters: dict[str, SavedAdapter] = {}
        self.active: str | None = None
        self._applied: Applied | None = None

    def load(self, name: str, folder: str | os.PathLike) -> None:
        """Read an adapter under a name; it is not applied yet.

        Raises:
            SpftFileError: the folder holds no sparse adapter, or a damaged one.
            SpftError: an adapter of this name is applied.
        """
        if name == self.active:
            raise SpftError(f"adapter `{name}` is applied: use another first, or None")
        self.adapters[name] = read_adapter(folder)

    def use(self, name: str | None) -> None:
        """Apply the adapter of this name instead of the present one; None: the base model alone.

        Raises:
            SpftError: there is none, or it does not fit; the base model alone is left.
        """
        if name is not None and name not in self.adapters:
            raise SpftError(f"there is no adapter `{name}`: load() it; there are {', '.join(self.adapters) or 'none'}")
        if name == self.active:
            return
        if self._applied is not None:
            self._applied.revert()
            self._applied, self.active = None, None
        if name is not None:
            self._applied = apply_adapter(self.model, self.adapters[name], self.rank, self.ranks, self.partial)
            self.active = name
