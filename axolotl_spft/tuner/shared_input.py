"""Layers that read the same tensor keep one copy of the columns that they need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from axolotl_spft.ops.csr import Mask, used_columns
from axolotl_spft.ops.linear import kept_columns
from axolotl_spft.ops.norm_output import NormOutput
from axolotl_spft.ops.plan import MULTIPLE, Plan, padded

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
        """`kept_columns` of x, and of ``inputs``, which is x in the dtype of the computation: once for all readers."""
        if len(self.readers) == 1 or torch.compiler.is_compiling():
            return kept_columns(x, inputs, plan)
        last, state = self._last, _state(x)
        if last is not None and last.state == state and last.columns is plan.columns:
            kept = last.kept()
            if kept is not None and kept.dtype == inputs.dtype:
                return kept
        kept = kept_columns(x, inputs, plan)
        weak = ref(kept) if isinstance(kept, NormOutput) else TensorWeakRef(kept)
        self._last = _Kept(StorageWeakRef(x.untyped_storage()), state, plan.columns, weak)
        return kept


def _state(x: Tensor) -> tuple:
    # not x itself: DeepSpeed's ZeRO-3 gives each layer an alias of its own
    return x.untyped_storage()._cdata, x._version, x.storage_offset(), x.shape, x.stride()


class _Kept(NamedTuple):
    """The columns of x that a layer kept last; by weak references, so that they live as long as backward needs them."""

    storage: StorageWeakRef  # while it exists, no other storage has the same number
    state: tuple
    columns: Tensor | None
    kept: TensorWeakRef | ref[NormOutput]


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
