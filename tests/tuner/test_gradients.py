"""The values' gradients in whole models equal the dense gradients at the mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

from axolotl_spft.salience.install import adapted_layers
from tests.interpreter import DEVICE
from tests.models import ARCHITECTURES, tiny_llama, token_batch, with_adapter

BATCH = token_batch(rows=3, length=9)


def dense_twin(model) -> nn.Module:
    """The merged model with all of its weights trained."""
    twin = copy.deepcopy(model).merge_and_unload()
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin


def assert_gradients_equal(model, twin, tolerance: float) -> None:
    for name, layer in adapted_layers(model).items():
        gradient = twin.get_submodule(name).weight.grad.float()
        expected = gradient.flatten()[layer.storage_positions(layer.mask("default")).long()]
        got = layer.spft_values["default"].grad
        assert got.dtype == layer.spft_values["default"].dtype
        assert (got.float() - expected).abs().max() <= tolerance * gradient.abs().max(), name


def backward(model, autocast: torch.dtype | None = None) -> torch.Tensor:
    model.train()
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        loss = model(**BATCH).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_equal_with_and_without_gradient_checkpointing(architecture, dtype, checkpointing):
    model = with_adapter(ARCHITECTURES[architecture](dtype), density=0.2)
    twin = dense_twin(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
    got, expected = backward(model), backward(twin)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert abs(got - expected) <= tolerance * expected
    assert_gradients_equal(model, twin, tolerance)


@pytest.mark.parametrize("checkpointing", [None, False])
def test_equal_under_autocast(checkpointing):
    model = with_adapter(tiny_llama(), density=0.2)
    twin = dense_twin(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    got, expected = backward(model, torch.bfloat16), backward(twin, torch.bfloat16)
    assert abs(got - expected) <= 0.02 * expected
    assert_gradients_equal(model, twin, 0.1)


def test_accumulated_over_two_backward_passes():
    model = with_adapter(tiny_llama())
    backward(model)
    once = {name: layer.spft_values["default"].grad.clone() for name, layer in adapted_layers(model).items()}
    backward(model)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.spft_values["default"].grad, 2 * once[name])


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("density", [0.02, 0.2], ids=["some columns", "all columns"])
def test_equal_under_torch_compile_without_a_graph_break(backend, architecture, density):
    torch._dynamo.reset()
    model = with_adapter(ARCHITECTURES[architecture](), density=density)
    layers = adapted_layers(model).values()

    def gradients(run) -> list[torch.Tensor]:
        # the loss is outside: the one of transformers' GPT-2 writes a log line, which breaks the graph
        run(input_ids=BATCH["input_ids"]).logits.logsumexp(-1).square().sum().backward()
        found = [layer.spft_values["default"].grad for layer in layers]
        for layer in layers:
            layer.spft_values["default"].grad = None
        return found

    # before the model has run without being compiled
    compiled = gradients(torch.compile(model, backend=backend, fullgraph=True))
    for got, expected in zip(compiled, gradients(model), strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_compiled_training_sees_every_update():
    """The compiled graph must not fold the values or the weight into constants."""
    torch._dynamo.reset()
    histories = []
    for compiled in (False, True):
        model = with_adapter(tiny_llama(), density=0.2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        step = torch.compile(model, backend="aot_eager") if compiled else model
        history = []
        for _ in range(4):
            history.append(backward(step).item())
            optimizer.step()
            optimizer.zero_grad()
        histories.append(history)
    assert histories[0][-1] < histories[0][0]
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
