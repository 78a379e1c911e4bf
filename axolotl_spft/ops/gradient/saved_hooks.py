"""What torch's gradient checkpointing does with the tensors that a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# None before torch 2.8
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def are_hooked() -> bool:
    """Whether hooks decide what is kept."""
    return _hooks() is not None


def must_keep_alike() -> bool:
    """Whether this pass may be one of torch's gradient checkpointing, which must keep alike whenever it runs again."""
    return _top_hooks is None or _checkpoint_hook() is not None


def keeps_shapes_only() -> bool:
    """Whether this is the first forward pass of a checkpoint that is not reentrant.

    It drops what is kept but for its shape, dtype and device, which it compares with those of the second pass.
    """
    hook = _checkpoint_hook()
    # selective checkpointing may count operations, which then must be those of the second pass
    return hook is not None and hook.startswith("_checkpoint_hook.") and not torch._C._len_torch_dispatch_stack()


def checkpointed_pass() -> object | None:
    """What stands for this pass of a checkpoint that is not reentrant, the first or the second; None outside of any."""
    return _hooks()[0] if _checkpoint_hook() is not None else None


def save(x: Tensor) -> Callable[[], Tensor]:
    """Keep x for the backward pass, in which it is to be asked for once.

    In a checkpoint that is not reentrant as autograd keeps it there: the first pass drops it, the second makes it
    again, and must then save as many tensors as the first.
    """
    if checkpointed_pass() is None:
        return lambda: x
    pack, unpack = _hooks()
    packed = pack(x)
    return lambda: unpack(packed)


def shape_only(x: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape, and of the dtype and device of x, that holds one value."""
    return x.new_empty(()).expand(shape)


def _hooks() -> tuple | None:
    return _top_hooks(True) if _top_hooks is not None else None


def _checkpoint_hook() -> str | None:
    """The name of the uppermost hook, if it is one of torch's gradient checkpointing."""
    hooks = _hooks()
    if hooks is None or getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        return None
    return hooks[0].__qualname__
