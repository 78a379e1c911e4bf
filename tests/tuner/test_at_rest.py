"""Between passes a weight holds W, whoever reads, copies, averages or overwrites it, and however a pass ended."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from axolotl_spft import SpftConfig
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from axolotl_spft.tuner.write_ahead import _Adapter
from tests.interpreter import DEVICE
from tests.models import logits, tiny_gpt2, tiny_llama, tiny_moe, token_batch, with_adapter


def tiny_model(seed: int = 0) -> nn.Module:
    """One `nn.Linear(3, 2)` with two values."""
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), SpftConfig(num_values=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.set_mask("default", mask_from_positions(torch.tensor([1, 3]), 2, 3), torch.randn(2))
    return model


def big_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return with_adapter(tiny_llama(dtype))


X = torch.arange(6.0).view(2, 3) - 2


def run(model: nn.Module, kind: str) -> torch.Tensor:
    """What came before: passes of several kinds, each twice, since layers write together from the second on."""
    for _ in range(2):
        with torch.set_grad_enabled(kind != "evaluation"):
            loss = model(X).square().sum() if "0" in adapted_layers(model) else model(**token_batch()).loss
        if kind == "training":
            loss.backward()
    return loss


def bases(model: nn.Module) -> list[torch.Tensor]:
    """What the base weights hold, read from the memory itself."""
    return [layer.get_base_layer().weight.detach().clone() for layer in adapted_layers(model).values()]


KINDS = ["evaluation", "no backward", "training"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny_model, big_model, lambda: big_model(torch.bfloat16).double()])
def test_parameters_hold_the_base_weight(make, kind):
    model = make().to(DEVICE) if make is not tiny_model else make()
    # stored long ago, as an optimizer or an average does
    before, stored, state = bases(model), list(model.parameters()), model.state_dict()
    copies = [tensor.detach().clone() for tensor in stored], {name: tensor.clone() for name, tensor in state.items()}
    kept = run(model, kind)
    assert all(map(torch.equal, before, bases(model)))
    assert all(map(torch.equal, stored, copies[0]))
    assert all(torch.equal(state[name], tensor) for name, tensor in copies[1].items())
    del kept


def average(model: nn.Module, kind: str) -> nn.Module:
    averaged = AveragedModel(model)
    run(model, kind)
    averaged.update_parameters(model)
    return averaged.module


def moving_average(model: nn.Module, kind: str) -> nn.Module:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        run(model, kind)
        averaged.update_parameters(model)
    return averaged.module


def copied(write):
    def make(model: nn.Module, kind: str) -> nn.Module:
        run(model, kind)
        target = copy.deepcopy(model)
        run(target, kind)
        kept = run(model, kind)
        with torch.no_grad():
            for p, q in zip(target.parameters(), model.parameters()):
                write(p, q)
        del kept
        return target

    return make


def assign_data(p, q):
    p.data = q.data.clone()


def load(model: nn.Module, kind: str) -> nn.Module:
    run(model, kind)
    target = copy.deepcopy(model)
    run(target, kind)
    target.load_state_dict(model.state_dict())
    return target


@pytest.mark.parametrize(("model", "kind"), [*((tiny_model, kind) for kind in KINDS), (big_model, "training")])
@pytest.mark.parametrize(
    "make",
    [
        average,
        moving_average,
        load,
        copied(lambda p, q: p.copy_(q)),
        copied(lambda p, q: p.lerp_(q, 0.3)),
        copied(lambda p, q: p.data.mul_(0.5).add_(q.data, alpha=0.5)),
        copied(assign_data),
    ],
)
def test_a_copy_made_by_its_parameters_merges_into_the_same(model, make, kind):
    source = model()
    base, layers = bases(source), adapted_layers(source)
    target = make(source, kind)
    assert all(map(torch.equal, base, bases(target)))
    merged = target.merge_and_unload()
    for name, layer in layers.items():
        total = layer.get_base_weight() + layer.get_delta_weight("default")
        torch.testing.assert_close(merged.get_submodule(name).weight, total)


@pytest.mark.parametrize("write", ["copy_", "data"])
def test_weights_that_are_overwritten_are_what_is_added_to(write):
    """The other side: what somebody wrote into the weights of a model that has run is its W from now on."""
    model = big_model()
    run(model, "training")
    new = {name: torch.randn_like(layer.get_base_layer().weight) for name, layer in adapted_layers(model).items()}
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            weight = layer.get_base_layer().weight
            (weight if write == "copy_" else weight.data).copy_(new[name])
    got = logits(model)
    assert all(torch.equal(layer.get_base_layer().weight, new[name]) for name, layer in adapted_layers(model).items())
    expected = tiny_llama()
    for name, layer in adapted_layers(model).items():
        expected.get_submodule(name).weight.data = new[name] + layer.get_delta_weight("default")
    torch.testing.assert_close(got, logits(expected), rtol=1e-4, atol=1e-4)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")


def broken_backward(model, x):
    hidden = model.base_model.model[0](x.requires_grad_())
    model.base_model.model[1](Breaks.apply(hidden)).sum().backward()


def broken_forward(model, x):
    model(x[:, :2])


def interrupted(model, x):
    handle = model.base_model.model[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        model.base_model.model(x)
    finally:
        handle.remove()


@pytest.fixture
def two():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return get_peft_model(net, SpftConfig(density=0.4, target_modules=["0", "1"], init_weights=False)).to(DEVICE)


@pytest.mark.parametrize("end", [broken_backward, broken_forward, interrupted])
def test_a_pass_that_breaks_off(two, end):
    base, x = bases(two), torch.randn(4, 5, device=DEVICE)
    expected = [two(x), two(x)][-1]
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        end(two, x.clone())
    if end is interrupted:
        # torch calls no hook then; the next pass finds the values of its own time all the same
        with torch.no_grad():
            for layer in adapted_layers(two).values():
                layer.spft_values["default"].mul_(1)
    y = two(x)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, base, bases(two)))


def test_an_interrupted_pass_does_not_keep_old_values(two):
    base, x = bases(two), torch.randn(4, 5, device=DEVICE)
    [two(x), two(x)]
    with pytest.raises(KeyboardInterrupt):
        interrupted(two, x)
    with torch.no_grad():
        for layer in adapted_layers(two).values():
            layer.spft_values["default"].mul_(-2)
    got = two(x)
    twin = copy.deepcopy(two)
    twin.base_model._stop_writing_ahead()
    assert torch.equal(got, twin(x))
    assert all(map(torch.equal, base, bases(two)))


@pytest.mark.parametrize("way", ["model", "tuner", "many passes"])
def test_an_interrupt_leaves_nothing_in_the_weights(two, way):
    base, x = bases(two), torch.randn(4, 5, device=DEVICE)
    [two(x), two(x)]
    second = two.base_model.model[1]
    held = []

    def interrupt(*_):
        held.append(second._written is not None)
        raise KeyboardInterrupt

    handle = second.register_forward_pre_hook(interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        two.base_model._ahead.running(two) if way == "many passes" else nullcontext(),
    ):
        (two if way == "model" else two.base_model)(x)
    handle.remove()
    assert held == [True]
    assert all(map(torch.equal, base, bases(two)))
    with torch.no_grad():
        for layer in adapted_layers(two).values():
            layer.spft_values["default"].mul_(-2)
    got = []
    thread = threading.Thread(target=lambda: got.append(two(x)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], two(x))
    assert all(map(torch.equal, base, bases(two)))


def test_a_thread_that_was_interrupted_and_is_gone_holds_nothing(two):
    """A pass of the inner model, around which only torch's hooks run, and those not when it is interrupted."""
    base, x = bases(two), torch.randn(4, 5, device=DEVICE)
    [two(x), two(x)]

    def breaks_off():
        with pytest.raises(KeyboardInterrupt):
            interrupted(two, x)

    thread = threading.Thread(target=breaks_off)
    thread.start()
    thread.join()
    with torch.no_grad():
        for layer in adapted_layers(two).values():
            layer.spft_values["default"].mul_(-2)
    got = two(x)
    assert all(map(torch.equal, base, bases(two)))
    twin = copy.deepcopy(two)
    twin.base_model._stop_writing_ahead()
    assert torch.equal(got, twin(x))


def gradients(model, loss):
    values = [layer.spft_values["default"] for layer in adapted_layers(model).values()]
    return torch.autograd.grad(loss, values, retain_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same(reentrant):
    model, plain = big_model(), big_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    base = bases(model)
    for each in (model, plain):
        each.train()
        for _ in range(2):
            each.zero_grad()
            each(**token_batch()).loss.backward()
    for one, other in zip(adapted_layers(model).values(), adapted_layers(plain).values()):
        torch.testing.assert_close(one.spft_values["default"].grad, other.spft_values["default"].grad)
    assert all(map(torch.equal, base, bases(model)))


def test_several_forward_passes_before_their_backward_passes(two):
    base, x = bases(two), [torch.randn(4, 5, device=DEVICE) for _ in range(3)]
    each = [gradients(two, two(one).square().sum()) for one in x]
    losses = [two(one).square().sum() for one in x]
    with torch.no_grad():
        two(x[0])
    for expected, loss in zip(reversed(each), reversed(losses)):
        for _ in range(2):
            # the graph may be used twice
            assert all(map(torch.equal, expected, gradients(two, loss)))
    assert all(map(torch.equal, base, bases(two)))
    again = checkpoint(two, x[0].requires_grad_(), use_reentrant=True).square().sum()
    again.backward()
    for layer, expected in zip(adapted_layers(two).values(), each[0]):
        torch.testing.assert_close(layer.spft_values["default"].grad, expected)
    assert all(map(torch.equal, base, bases(two)))


def test_a_backward_pass_writes_all_layers_at_once(two, monkeypatch):
    x = torch.randn(4, 5, device=DEVICE)
    [two(x), two(x)]
    loss = two(x.requires_grad_()).sum()
    monkeypatch.setattr(SpftLinear, "_written_for_now", None)
    layer = two.base_model.model[0]
    seen = []
    layer.spft_values["default"].register_hook(lambda _: seen.append(layer._written is not None))
    loss.backward()
    assert seen == [True]
    assert layer._written is None


@pytest.mark.parametrize("quantity", [1, 2])
def test_threads_share_what_is_written(two, quantity):
    """A pass that ends first leaves the weights to the others."""
    base, x = bases(two), torch.randn(4, 5, device=DEVICE)
    expected = [two(x), two(x)][-1]
    entered, finish, got = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            finish.wait(20)

    two.base_model.model[1].register_forward_pre_hook(wait)
    threads = [threading.Thread(target=lambda: got.append(two(x))) for _ in range(quantity)]
    for thread in threads:
        thread.start()
    entered.wait(20)
    assert torch.equal(two(x), expected)
    assert adapted_layers(two)["1"]._written is not None
    finish.set()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for y in got)
    assert all(map(torch.equal, base, bases(two)))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_moe])
def test_a_generation_writes_once(make, monkeypatch):
    model = with_adapter(make(), task_type="CAUSAL_LM")
    base, ids = bases(model), token_batch()["input_ids"][:1, :3]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    count = []
    with monkeypatch.context() as patch:
        patch.setattr(SpftLinear, "_written_for_now", None)
        write = _Adapter.write
        patch.setattr(_Adapter, "write", lambda self: count.append(0) or write(self))
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert len(count) == 1
    assert all(map(torch.equal, base, bases(model)))
    twin = copy.deepcopy(model)
    twin.base_model._stop_writing_ahead()
    assert torch.equal(twin.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)


def test_a_backward_pass_after_a_merge_has_the_gradient_of_its_forward_pass(two):
    x = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(two(x).square().sum(), x)
    loss = two(x).square().sum()
    two.merge_adapter()
    merged = bases(two)
    (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, expected)
    assert all(map(torch.equal, merged, bases(two)))
