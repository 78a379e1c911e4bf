"""Layers that read the same tensor keep one copy of the columns that they need of it, or none behind a norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from axolotl_spft.ops.gradient.norm_output import NormOutput, alias_of, norm_output
from axolotl_spft.ops.gradient.saved_hooks import keeps_shapes_only, must_keep_alike, shape_only
from axolotl_spft.ops.linear import kept_columns
from axolotl_spft.ops.mask.csr import Mask, used_columns
from axolotl_spft.ops.mask.plan import MULTIPLE, Plan, padded

# names, under one parent, of the layers that transformers' models call with one tensor. Where such layers get
# different ones all the same, as in cross-attention, each keeps a copy of its own, of a few columns more
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Reader(Protocol):
    """What is needed of a layer."""

    in_features: int
    spft_columns: Mapping[str, Tensor]

    def mask(self, adapter_name: str) -> Mask:
        """The CSR mask of an adapter."""


class SharedInput:
    """The layers that read one tensor x, one layer or several.

    Attributes:
        readers: the layers.
    """

    def __init__(self, readers: Sequence[Reader]):
        self.readers = readers
        self.forget()

    def __getstate__(self) -> dict:
        # reached by copy.deepcopy and pickling, which weak references would not survive
        return {"readers": self.readers}

    def __setstate__(self, state: dict) -> None:
        self.readers = state["readers"]
        self.forget()

    def forget(self) -> None:
        """Forget what was worked out from the masks, and from x."""
        self._union: dict[tuple[str, ...], Tensor] = {}
        self._last: _Kept | None = None
        self._can_make_again: bool | None = None

    def columns(self, adapter_names: tuple[str, ...]) -> Tensor | None:
        """The columns of x that any reader uses for these adapters, for `make_plan`; None for a single reader."""
        if len(self.readers) == 1:
            return None
        if adapter_names not in self._union:
            used = [
                used_columns(reader.mask(name), reader.in_features)
                for reader in self.readers
                for name in adapter_names
                if name in reader.spft_columns
            ]
            union = torch.cat(used).unique().to(torch.int32)
            # here and not by each reader, so that all copy the same columns
            self._union[adapter_names] = padded(union, MULTIPLE)
        return self._union[adapter_names]

    def keep(self, x: Tensor, inputs: Tensor, plan: Plan) -> Tensor | NormOutput:
        """What backward needs of x, or of ``inputs``, x in the dtype of the computation: once for all readers."""
        if torch.compiler.is_compiling():
            return kept_columns(inputs, plan)
        if plan.columns is not None and keeps_shapes_only():
            return shape_only(inputs, inputs.shape[:-1].numel(), plan.columns.numel())
        if len(self.readers) == 1:
            return self._columns(x, inputs, plan)
        last, alias, alike = self._last, alias_of(x), must_keep_alike()
        if last is not None and last.is_of(x, alias) and last.alike == alike and last.columns is plan.columns:
            kept = last.kept()
            if kept is not None and kept.dtype == inputs.dtype:
                return kept
        kept = self._columns(x, inputs, plan)
        weak = ref(kept) if isinstance(kept, NormOutput) else TensorWeakRef(kept)
        self._last = _Kept(TensorWeakRef(x), x._version, alias, alike, plan.columns, weak)
        return kept

    def _columns(self, x: Tensor, inputs: Tensor, plan: Plan) -> Tensor | NormOutput:
        normed = None
        if self._can_make_again is not False and x.shape[-1] == plan.in_features:
            normed = norm_output(x, plan.columns, inputs.dtype)
        if normed is None:
            return kept_columns(inputs, plan)
        if self._can_make_again and not normed.hooked:
            return normed
        # a hook of a module may have changed x unseen; one look tells, and it makes a GPU wait once
        kept = kept_columns(inputs, plan)
        right = normed.is_right(kept)
        if not normed.hooked:
            self._can_make_again = right
        return normed if right else kept


class _Kept(NamedTuple):
    """What a layer kept last of x; by weak references, so that it lives as long as backward needs it."""

    x: TensorWeakRef
    version: int
    alias: tuple | None
    alike: bool
    columns: Tensor | None
    kept: TensorWeakRef | ref[NormOutput]

    def is_of(self, x: Tensor, alias: tuple | None) -> bool:
        return self.version == x._version and (self.x() is x or (alias is not None and self.alias == alias))


def group_by_input(in_features: Mapping[str, int]) -> list[list[str]]:
    """Groups of modules that read one tensor, by their full names; each module is in one of them.

    Args:
        in_features: of each module, by its full name.
    """
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, width in in_features.items():
        parent, _, last = name.rpartition(".")
        first = next((together[0] for together in _SAME_INPUT if last in together), last)
        groups.setdefault((parent, first, width), []).append(name)
    return list(groups.values())
