"""Columns of an RMS norm's output, made again in the backward pass.

    X = round(round(H r) w)

with H (tokens, features) in float32, r (tokens, 1) one over its root mean square, and the norm's weight w (features).
The norm keeps H and r for its own backward pass, which comes after that of the layers that read X. So these need keep
nothing: q, k and v, or gate and up, together use most columns of X, and copies of them would be most of what sparse
layers keep.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from axolotl_spft.ops.columns import select_normed_columns

# what DeepSpeed's ZeRO-3 passes each module's inputs and outputs through
_UNCHANGED = ("PostBackwardFunctionModuleBackward", "PreBackwardFunctionForModuleBackward")
# None before torch 2.8
_current_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class NormOutput:
    """X[:, columns] of an RMS norm's output X, for the backward passes of the layers that read X.

    Attributes:
        dtype: of the columns.
        readers: how many backward passes ask for them: they are made for the first, and dropped after the last.
    """

    def __init__(self, product: Node, weight: Tensor, columns: Tensor | None, dtype: torch.dtype, rounds: bool):
        self._product, self._columns, self.dtype, self._rounds = product, columns, dtype, rounds
        # a copy: ZeRO-3 releases the norm's own weight between forward and backward
        weight = weight.detach()
        weight = weight.clone() if columns is None else weight.index_select(0, columns)
        self._weight = weight.to(torch.float32)
        self.readers = self._left = 0
        self._made: Tensor | None = None

    def columns(self) -> Tensor:
        """(tokens, columns) in ``dtype``, with the bits of X."""
        made = self._made
        if made is None:
            product = self._product
            made = self._made = select_normed_columns(
                product._saved_self, product._saved_other, self._weight, self._columns, self.dtype, self._rounds
            )
            self._left = self.readers
        self._left -= 1
        if self._left <= 0:
            self._made = None
        return made


def norm_output(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> NormOutput | None:
    """The columns of x in ``dtype``, if x is the untouched output of an RMS norm that keeps what they are made from.

    Recognized are norms of plain torch operations, as transformers writes them: ``w * (h * r).to(dtype)``, or Gemma's
    ``(h * r * w).to(dtype)``.

    Args:
        x: (..., features).
        columns: int32, ascending; None: all.
    """
    node = x.grad_fn
    # after a change in place x is no longer what the norm made
    if node is None or x._version or x.dtype not in (torch.float32, dtype) or _recomputes():
        return None
    while node.name() in _UNCHANGED:
        node = node.next_functions[0][0]
    node = _before_cast(node)
    if node.name() != "MulBackward0":
        return None
    for side, other in (("self", 1), ("other", 0)):
        weight = _kept_by(node, side)
        if weight is not None and weight.shape == x.shape[-1:]:
            product = node.next_functions[other][0]
            break
    else:
        return None
    # the dtype of its result, which is the shape that its gradient will have
    between = product._input_metadata[0].dtype if product is not None else None
    product = _before_cast(product)
    if between not in (torch.float32, dtype) or product.name() != "MulBackward0":
        return None
    h, scale = _kept_by(product, "self"), _kept_by(product, "other")
    if h is None or scale is None or h.shape != x.shape or scale.shape != (*x.shape[:-1], 1):
        return None
    if any(each.dtype != torch.float32 or each.device != x.device or not each.is_contiguous() for each in (h, scale)):
        return None
    return NormOutput(product, weight, columns, dtype, rounds=between != torch.float32)


def _before_cast(node: Node) -> Node:
    return node.next_functions[0][0] if node.name() == "ToCopyBackward0" else node


def _kept_by(node: Node, side: str) -> Tensor | None:
    """What a product keeps of one side, if it is kept as it is: hooks may put a number or a file in its place."""
    # not unpacked: the hooks of offloading can do so once only
    kept = getattr(getattr(node, f"_raw_saved_{side}"), "data", None)
    return kept if isinstance(kept, Tensor) else None


def _recomputes() -> bool:
    """Whether this pass may be one of torch's gradient checkpointing, which must keep alike whenever it runs again."""
    if _current_hooks is None:
        return True
    hooks = _current_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
