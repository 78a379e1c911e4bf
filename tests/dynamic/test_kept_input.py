"""What is kept between the forward and the backward pass that gradients are collected from."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from axolotl_spft import DynamicMask
from axolotl_spft.dynamic.kept_input import KeptInput
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.collect import gathered_gradients
from axolotl_spft.salience.install import adapted_layers
from tests.models import tiny_llama, token_batch, with_adapter


def inputs_alive(model, collecting) -> int:
    """How many of the layers' inputs a forward pass leaves in memory for the backward pass that follows."""
    seen: set[StorageWeakRef] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.add(StorageWeakRef(args[0].untyped_storage())))
        for layer in adapted_layers(model).values()
    ]
    with collecting:
        loss = model(**token_batch()).loss
        alive = sum(not each.expired() for each in seen)
        loss.backward()
    for hook in hooks:
        hook.remove()
    return alive


@pytest.mark.parametrize("way", ["reselect", "salience"])
def test_a_checkpoint_that_is_not_reentrant_still_keeps_nothing_within(way):
    model = with_adapter(tiny_llama(num_hidden_layers=3)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    without = inputs_alive(model, nullcontext())
    collecting = (
        DynamicMask(model).collecting() if way == "reselect" else gathered_gradients(model, adapted_layers(model))
    )
    assert inputs_alive(model, collecting) == without


def test_one_tensor_is_kept_once_and_another_at_its_address_is_not_it():
    x = torch.ones(3)
    kept = KeptInput(x)
    assert kept.is_of(x) and kept.is_of(x.view(3)) and not kept.is_of(x[:2]) and not kept.is_of(x.clone())
    assert kept.keep("layer", lambda tensor: tensor).data_ptr() == x.data_ptr()
    assert not kept.is_of(x)
    kept = KeptInput(x)
    x.add_(1)
    assert not kept.is_of(x)
    with pytest.raises(SpftError, match="changes the input of layer in place"):
        kept.keep("layer", lambda tensor: tensor)
