"""Several threads that compute with one model whose experts have sparse deltas."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftError
from tests.experts import PARAMETERS, four_bit_experts, tiny_mixtral
from tests.models import logits, same_weights, token_batch, weights_of, with_adapter
from tests.threads import SOON, in_threads

KINDS = ["in place", "shared memory", "shared base", "4 bit"]


def adapted(kind: str) -> nn.Module:
    base, twin = tiny_mixtral(num_hidden_layers=1), tiny_mixtral(num_hidden_layers=1)
    if kind == "4 bit":
        four_bit_experts(base)
    model, other = (with_adapter(each, target_modules=[], target_parameters=PARAMETERS) for each in (base, twin))
    if kind == "shared base":
        other.load_state_dict(model.state_dict(), assign=True)
        logits(other)
        model.kept = (other,)
    return model.share_memory() if kind == "shared memory" else model


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: nn.Module) -> Tensor:
    return model(**token_batch()).loss


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(model), values_of(model))


@contextmanager
def noted(model: nn.Module, call: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block ``call`` is given what the experts have computed in the midst of their pass, once per pass."""
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    seen = []

    def begin(*_):
        seen.clear()

    def computed(_, __, y):
        if not seen:
            seen.append(True)
            call(y)

    handles = [experts.register_forward_pre_hook(begin), experts.act_fn.register_forward_hook(computed)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("run", [logits, gradients], ids=["evaluates", "trains"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_begins_in_the_midst_of_that_of_another_thread(kind, run):
    model = adapted(kind)
    start, expected, got = weights_of(model), logits(model), []
    with model.disable_adapter():
        base = logits(model)
    inside, over = threading.Event(), threading.Event()
    first: list[int] = []

    def wait(_):
        if threading.get_ident() in first:
            inside.set()
            over.wait(SOON)

    def runs():
        first.append(threading.get_ident())
        run(model)

    def evaluates():
        inside.wait(30)
        got.append(logits(model))
        over.set()

    with noted(model, wait):
        in_threads(runs, evaluates)
    assert torch.equal(got[0], expected)
    # and nothing of it is left
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert same_weights(model, start)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_train_and_evaluate(kind):
    model = adapted(kind)
    start, expected, alone, got, found = weights_of(model), logits(model), gradients(model), [], []
    ready = threading.Barrier(3)

    def trains():
        ready.wait(30)
        found.extend(gradients(model) for _ in range(6))

    def evaluates():
        ready.wait(30)
        got.extend(logits(model) for _ in range(12))

    in_threads(trains, trains, evaluates)
    assert len(got) == 12 and all(torch.equal(each, expected) for each in got)
    assert len(found) == 12 and all(all(map(torch.equal, each, alone)) for each in found)
    assert same_weights(model, start)


def test_a_backward_pass_that_ends_in_the_midst_of_that_of_another_thread():
    model = adapted("in place")
    start, expected, found = weights_of(model), gradients(model), []
    first_inside, second_inside, first_over = (threading.Event() for _ in range(3))

    def stops(reached, until):
        def stop(_):
            reached.set()
            until.wait(SOON)

        return lambda y: y.register_hook(stop)

    with noted(model, stops(first_inside, second_inside)):
        first = loss_of(model)
    with noted(model, stops(second_inside, first_over)):
        second = loss_of(model)

    def ends_first():
        found.append(torch.autograd.grad(first, values_of(model)))
        first_over.set()

    def ends_last():
        first_inside.wait(30)
        found.append(torch.autograd.grad(second, values_of(model)))

    in_threads(ends_first, ends_last)
    assert all(all(map(torch.equal, each, expected)) for each in found)
    assert same_weights(model, start)


def test_a_backward_pass_that_fails_leaves_w():
    model = adapted("in place")
    start, expected = weights_of(model), gradients(model)

    def fail(_):
        raise ValueError("wrong")

    with noted(model, lambda y: y.register_hook(fail)):
        loss = loss_of(model)
    with pytest.raises(ValueError, match="wrong"):
        torch.autograd.grad(loss, values_of(model))
    del loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name])
    assert all(map(torch.equal, gradients(model), expected))
    assert same_weights(model, start)


def test_weights_that_another_thread_saves_in_the_midst_of_a_forward_pass():
    model = adapted("in place")
    start, expected, saved = weights_of(model), logits(model), {}
    over = threading.Event()

    def saves():
        saved.update(weights_of(model))
        over.set()

    other = threading.Thread(target=saves, daemon=True)

    def save(_):
        other.start()
        over.wait(SOON)

    with noted(model, save):
        got = logits(model)
    other.join(30)
    assert torch.equal(got, expected)
    assert saved.keys() == start.keys() and all(torch.equal(saved[name], start[name]) for name in start)


def test_weights_that_another_thread_saves_in_the_midst_of_a_backward_pass():
    """Which are W: the backward pass has lost W + S then, and says so."""
    model = adapted("in place")
    start, saved = weights_of(model), {}

    def save(_):
        in_threads(lambda: saved.update(weights_of(model)))

    with noted(model, lambda y: y.register_hook(save)):
        loss = loss_of(model)
    with pytest.raises(SpftError, match=r"did not hold W \+ S .* while another thread trains"):
        torch.autograd.grad(loss, values_of(model))
    assert all(torch.equal(saved[name], start[name]) for name in start)
    assert same_weights(model, start)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpoints_in_two_threads(kind, reentrant):
    model = adapted(kind).train()
    model.enable_input_require_grads()
    expected, found = gradients(model), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ready = threading.Barrier(2)

    def trains():
        ready.wait(30)
        for _ in range(4):
            # reentrant checkpoints do not go with torch.autograd.grad
            loss_of(model).backward()

    def evaluates():
        ready.wait(30)
        found.extend(logits(model) for _ in range(8))

    start = logits(model)
    in_threads(trains, evaluates)
    assert all(torch.equal(each, start) for each in found)
    for values, gradient in zip(values_of(model), expected):
        torch.testing.assert_close(values.grad, 4 * gradient)
