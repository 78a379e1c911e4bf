"""What is told of the hooks around a forward pass: none, a checkpoint's first and second pass, and others."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from axolotl_spft.ops.gradient.saved_hooks import are_hooked, keeps_shapes_only, must_keep_alike, shape_only


def told() -> tuple[bool, bool, bool]:
    return are_hooked(), must_keep_alike(), keeps_shapes_only()


class Counting(TorchDispatchMode):
    """As selective checkpointing's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reentrant", "mode", "expected"),
    [
        # reentrant: without gradients, then a pass like any other
        (True, nullcontext, [(False, False, False)] * 2),
        (False, nullcontext, [(True, True, True), (True, True, False)]),
        (False, Counting, [(True, True, False)] * 2),
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_the_passes_of_a_checkpoint(reentrant, mode, expected):
    passes = []

    def run(x):
        with mode():
            passes.append(told())
        return x.exp()

    checkpoint(run, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert passes == expected


def test_other_hooks_and_none():
    assert told() == (False, False, False)
    with torch.autograd.graph.save_on_cpu():
        assert told() == (True, False, False)


def test_where_torch_cannot_tell_a_pass_may_be_a_checkpoints(monkeypatch):
    monkeypatch.setattr("axolotl_spft.ops.gradient.saved_hooks._top_hooks", None)
    assert told() == (False, True, False)


def test_a_shape_holds_one_value():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    got = shape_only(x, 500, 7)
    assert (got.shape, got.dtype, got.device) == ((500, 7), x.dtype, x.device)
    assert got.untyped_storage().nbytes() == x.element_size()
