"""A batch whose rows use different adapters, as PEFT's ``adapter_names`` names them; for inference.

W of all rows is multiplied once; the rows of each adapter then get its own sparse branch, y + x S^T.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from axolotl_spft.errors import SpftError, first_of
from axolotl_spft.ops.branch import add_sparse_branch
from axolotl_spft.tuner.sparse_layer import SparseLayer

# PEFT's name for the rows that no adapter changes
BASE = "__base__"
# what models call their batch, whatever else they are given beside it
_BATCH = ("input_ids", "inputs_embeds", "input_features", "input_values", "inputs")
# which get the tokens that are routed to them, of any row
_ROUTED = re.compile(r"(^|\.)experts\.\d+(\.|$)")


@contextmanager
def adapters_by_row(
    tuner: nn.Module, layers: Mapping[str, SparseLayer], adapter_names: Sequence[str], args: tuple, kwargs: Mapping
) -> Iterator[None]:
    """Within the block each row of a batch is computed with the adapter that stands at its place.

    Args:
        tuner: the `SpftModel`, in evaluation.
        layers: its sparse layers, by name.
        adapter_names: one for each row of the batch; ``__base__`` for a row that none changes.
        args, kwargs: what the model, or its ``generate``, is about to be called with.

    Raises:
        SpftError: the model is in train mode, an adapter is merged, there is no such adapter, or not one for each row.
    """
    problem = _problem_of(tuner.model, layers, adapter_names, args, kwargs) or _problem_of_biases(tuner, adapter_names)
    if problem:
        raise SpftError(problem)

    def give_names(_: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return inputs, {**options, "adapter_names": adapter_names}

    def check_length(_: nn.Module, inputs: tuple, options: Mapping[str, Any]) -> None:
        batch = _batch_of(inputs, options)
        if batch is not None and len(batch) != len(adapter_names):
            raise SpftError(_mismatch(adapter_names, batch))

    with ExitStack() as hooks:
        # PEFT's models of a task keep the batch from the arguments that are known here; `generate` passes this by,
        # and may have several rows of each example
        hooks.callback(tuner.register_forward_pre_hook(check_length, with_kwargs=True).remove)
        for module in tuner.model.modules():
            if getattr(module, "mixes_rows", False):
                hooks.callback(module.register_forward_pre_hook(give_names, with_kwargs=True).remove)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                hooks.enter_context(_whole_module_by_row(module, adapter_names))
        yield


@contextmanager
def _whole_module_by_row(wrapper: AuxiliaryTrainingWrapper, adapter_names: Sequence[str]) -> Iterator[None]:
    """The same of a module that ``modules_to_save`` trains whole, which PEFT computes by the names of its rows."""

    def give_names(_: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return inputs, {**options, "adapter_names": names_of_rows(adapter_names, _batch_of(inputs, options))}

    handle = wrapper.register_forward_pre_hook(give_names, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def names_of_rows(adapter_names: Sequence[str], x: Tensor) -> list[str]:
    """The adapter of each row of x, which holds several rows of each example under beam search, or one per token."""
    each, rest = divmod(len(x), len(adapter_names))
    if rest or not each:
        raise SpftError(_mismatch(adapter_names, x))
    return [name for name in adapter_names for _ in range(each)]


def add_branches_(y: Tensor, x: Tensor, owner: SparseLayer, adapter_names: Sequence[str]) -> Tensor:
    """Add x S^T to the rows of a linear layer's output, of each row with the S of its adapter.

    Args:
        y: (rows, ..., out_features), what W alone gives; it is written to.
        x: (rows, ..., in_features).
        owner: the sparse layer that holds S.
        adapter_names: as in `adapters_by_row`.
    """

    def with_branch(name: str, rows: Tensor) -> Tensor:
        delta, _ = owner.delta_of((name,))
        values = owner.values_added(name)
        inputs = x.index_select(0, rows.to(x.device)).to(y.device)
        return add_sparse_branch(y.index_select(0, rows), inputs, values, delta.mask, delta.plan)

    return _replace_rows_(y, x, owner, adapter_names, with_branch)


def look_up_by_row_(
    y: Tensor, ids: Tensor, owner: SparseLayer, embedding: nn.Module, adapter_names: Sequence[str]
) -> Tensor:
    """The same of an embedding's output: the rows of the batch ``ids`` (rows, ...) are looked up in W + S."""

    def looked_up(name: str, rows: Tensor) -> Tensor:
        return owner.look_up(ids.index_select(0, rows.to(ids.device)), embedding, (name,)).to(y.device)

    return _replace_rows_(y, ids, owner, adapter_names, looked_up)


def _replace_rows_(
    y: Tensor,
    x: Tensor,
    owner: SparseLayer,
    adapter_names: Sequence[str],
    output_of: Callable[[str, Tensor], Tensor],
) -> Tensor:
    if any(map(owner.has_values, adapter_names)):
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names_of_rows(adapter_names, x)):
            if owner.has_values(name):
                rows.setdefault(name, []).append(row)
        for name, own in rows.items():
            places = torch.tensor(own, device=y.device)
            y.index_copy_(0, places, output_of(name, places))
    return y


def _problem_of(
    model: nn.Module, layers: Mapping[str, SparseLayer], adapter_names: Sequence[str], args: tuple, kwargs: Mapping
) -> str | None:
    if isinstance(adapter_names, str) or not adapter_names:
        return f"`adapter_names: {adapter_names!r}` must be a list with the adapter of each row of the batch"
    if model.training:
        return "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first"
    used = {name for name in adapter_names if name != BASE}
    unknown = used - {name for layer in layers.values() for name in layer.spft_values}
    if unknown:
        return f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
    if any(layer.merged for layer in layers.values()):
        return "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
    filled = {name: layer for name, layer in layers.items() if any(map(layer.has_values, used))}
    whole = [name for name, layer in filled.items() if not layer.mixes_rows]
    if whole:
        return f"`adapter_names` cannot be given to {first_of(whole, ', ')}: run the rows of each adapter by themselves"
    routed = [name for name in filled if _ROUTED.search(name)]
    if routed:
        return (
            f"`adapter_names`: {first_of(routed, ', ')} get tokens of any row, so nothing says whose adapter each one "
            "has: run the rows of each adapter by themselves"
        )
    batch = _batch_of(args, kwargs)
    if batch is not None and len(batch) != len(adapter_names):
        return _mismatch(adapter_names, batch)
    return None


def _problem_of_biases(tuner: nn.Module, adapter_names: Sequence[str]) -> str | None:
    trained = [name for name, config in tuner.peft_config.items() if getattr(config, "bias", "none") != "none"]
    if not trained or set(adapter_names) <= set(trained):
        return None
    return (
        f"`adapter_names`: the biases that `{trained[0]}` trained (`bias: all`) are the model's own, so that other "
        "rows would have them too: run the rows of each adapter on a model of its own"
    )


def _batch_of(args: tuple, kwargs: Mapping) -> Tensor | None:
    named = [kwargs.get(name) for name in _BATCH]
    tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    return tensors[0] if tensors else None


def _mismatch(adapter_names: Sequence[str], x: Tensor) -> str:
    return (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} and "
        f"{len(x)} respectively."
    )
