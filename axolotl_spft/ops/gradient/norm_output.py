"""Columns of an RMS norm's output, made again in the backward pass.

    X = round(round(H r) w)

with H (tokens, features) in float32, r (tokens, 1) one over its root mean square, and the norm's weight w (features).
The norm keeps H and r for its own backward pass, which comes after that of the layers that read X. So these need keep
nothing: q, k and v, or gate and up, together use most columns of X, and copies of them would be most of what sparse
layers keep.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from axolotl_spft.ops.backends.dispatch import DTYPES
from axolotl_spft.ops.gradient.columns import select_normed_columns
from axolotl_spft.ops.gradient.saved_hooks import are_hooked, must_keep_alike

# what DeepSpeed's ZeRO-3 passes each module's inputs and outputs through, itself and by torch's backward hooks
_ALIASES = (
    "PostBackwardFunctionModuleBackward", "PreBackwardFunctionForModuleBackward", "BackwardHookFunctionBackward",
)  # fmt: skip


class NormOutput:
    """X[:, columns] of an RMS norm's output X, for the backward passes of the layers that read X.

    Attributes:
        dtype: of the columns.
        hooked: whether hooks decide what the norm keeps, so that it may be something else than H and r.
        readers: how many backward passes ask for them: they are made for the first, and dropped after the last.
    """

    def __init__(self, product: Node, weight: Tensor, columns: Tensor | None, dtype: torch.dtype, rounds: bool):
        self._product, self._columns, self.dtype, self._rounds = product, columns, dtype, rounds
        # a copy: ZeRO-3 releases the norm's own weight between forward and backward
        weight = weight.detach()
        weight = weight.clone() if columns is None else weight.index_select(0, columns)
        self._weight = weight.to(torch.float32)
        self.hooked = are_hooked()
        self.readers = self._left = 0
        self._made: Tensor | None = None

    def columns(self) -> Tensor:
        """(tokens, columns) in ``dtype``, with the bits of X."""
        made = self._made
        if made is None:
            made = self._made = self._make(self._product._saved_self, self._product._saved_other)
            self._left = self.readers
        self._left -= 1
        if self._left <= 0:
            self._made = None
        return made

    def is_right(self, columns: Tensor) -> bool:
        """Whether these columns of X are what would be made again from what the norm keeps now."""
        made = self._make(_kept_by(self._product, "self"), _kept_by(self._product, "other"))
        return torch.equal(made, columns.reshape(made.shape))

    def _make(self, h: Tensor, scale: Tensor) -> Tensor:
        return select_normed_columns(h.detach(), scale.detach(), self._weight, self._columns, self.dtype, self._rounds)


def norm_output(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> NormOutput | None:
    """The columns of x in ``dtype``, if x is the output of an RMS norm that keeps what they are made from.

    Recognized are norms of plain torch operations, as transformers writes them: ``w * (h * r).to(dtype)``, or Gemma's
    ``(h * r * w).to(dtype)``. Not every change of x since can be seen here: see `NormOutput.is_right`.

    Args:
        x: (..., features).
        columns: int32, ascending; None: all.
    """
    # after a change in place x is no longer what the norm made
    if x.grad_fn is None or x._version or dtype not in DTYPES or x.dtype not in (torch.float32, dtype):
        return None
    if must_keep_alike() or _compiles_backward():
        return None
    node = _before_cast(_before_aliases(x.grad_fn))
    if node is None or node.name() != "MulBackward0":
        return None
    for side, other in (("self", 1), ("other", 0)):
        weight = _kept_by(node, side)
        if weight is not None and weight.shape == x.shape[-1:]:
            product = node.next_functions[other][0]
            break
    else:
        return None
    if product is None:
        return None
    # of the gradient that the node takes, which is that of the forward pass's result
    between = product._input_metadata[0].dtype
    product = _before_cast(product)
    if between not in (torch.float32, dtype) or product is None or product.name() != "MulBackward0":
        return None
    h, scale = _kept_by(product, "self"), _kept_by(product, "other")
    if not _fits(h, x.shape, x.device) or not _fits(scale, (*x.shape[:-1], 1), x.device):
        return None
    if weight.device != x.device or not weight.untyped_storage().nbytes():
        return None
    return NormOutput(product, weight, columns, dtype, rounds=between != torch.float32)


def alias_of(x: Tensor) -> tuple | None:
    """What two aliases of one tensor that ZeRO-3 made for two layers have in common; None for any other tensor."""
    if x.grad_fn is None or x.grad_fn.name() not in _ALIASES:
        return None
    node = _before_aliases(x.grad_fn)
    # the number of a node that a forward pass made is its own; leaves have none
    if node is None or node.name().endswith("AccumulateGrad"):
        return None
    return node._sequence_nr(), x.data_ptr(), x.shape, x.stride()


def _before_aliases(node: Node | None) -> Node | None:
    """The node that made what ZeRO-3 has made aliases of."""
    while node is not None and node.name() in _ALIASES:
        node = node.next_functions[0][0]
    return node


def _before_cast(node: Node | None) -> Node | None:
    return node.next_functions[0][0] if node is not None and node.name() == "ToCopyBackward0" else node


def _kept_by(node: Node, side: str) -> Tensor | None:
    """What a product keeps of one side, if it is a tensor: hooks may put a number or a file in its place."""
    # not unpacked, which hooks may be able to do once only
    saved = node._raw_saved_self if side == "self" else node._raw_saved_other
    kept = getattr(saved, "data", None)
    return kept if isinstance(kept, Tensor) else None


def _fits(kept: Tensor | None, shape: Sequence[int], device: torch.device) -> bool:
    return (
        kept is not None
        and kept.shape == shape
        and kept.dtype == torch.float32
        and kept.device == device
        and kept.is_contiguous()
    )


def _compiles_backward() -> bool:
    # compiled autograd takes what nodes keep away from them
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and dynamo.config.compiled_autograd
