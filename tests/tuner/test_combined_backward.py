"""One backward pass of several forward passes, of which some have S in a layer and some have W alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch import nn

from axolotl_spft import SpftConfig
from axolotl_spft.tuner.random_values import fill_randomly
from tests.experts import PARAMETERS, tiny_gpt_oss, tiny_mixtral
from tests.interpreter import DEVICE
from tests.models import same_weights, tiny_gpt2, tiny_llama, token_batch, weights_of, with_adapter


def tied_llama() -> nn.Module:
    return with_adapter(tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])


def experts(make) -> nn.Module:
    return with_adapter(make(), target_modules=[], target_parameters=PARAMETERS)


MODELS = {
    "llama": lambda: with_adapter(tiny_llama()),
    "conv1d": lambda: with_adapter(tiny_gpt2()),
    "tied head": tied_llama,
    "experts": lambda: experts(tiny_mixtral),
    "transposed experts": lambda: experts(tiny_gpt_oss),
}


class Passes:
    """Passes of a model, and what a backward pass of some leaves of gradients in the model and before it.

    Args:
        model: with an adapter.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        torch.manual_seed(1)
        width = model.get_input_embeddings().embedding_dim
        self.front = nn.Linear(3, width).to(DEVICE)
        self.features = torch.randn(2, 11, 3).to(DEVICE)

    def adapted(self) -> torch.Tensor:
        return self.model(inputs_embeds=self.front(self.features), labels=token_batch()["labels"]).loss

    def plain(self) -> torch.Tensor:
        with self.model.disable_adapter():
            return self.adapted()

    def gradients(self, run) -> dict[str, torch.Tensor]:
        held = [*self.model.named_parameters(), *self.front.named_parameters()]
        for _, parameter in held:
            parameter.grad = None
        run()
        return {name: p.grad.clone() for name, p in held if p.grad is not None}

    def check(self, first, second) -> None:
        def apart():
            first().backward()
            second().backward()

        expected = self.gradients(apart)
        assert "weight" in expected
        for losses in ((first, second), (second, first)):
            found = self.gradients(lambda losses=losses: sum(loss() for loss in losses).backward())
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_without_the_adapter_beside_one_with_it(kind):
    passes = Passes(MODELS[kind]())
    start = weights_of(passes.model)
    for _ in range(2):
        passes.check(passes.plain, passes.adapted)
    assert same_weights(passes.model, start)


def test_a_compiled_layer_without_the_adapter_beside_one_with_it():
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = SpftConfig(density=0.3, target_modules=["0", "1"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), config).to(DEVICE)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(4, 5, device=DEVICE)

    def gradient(*passes):
        each = x.clone().requires_grad_()
        total = 0
        for run, enabled in passes:
            with nullcontext() if enabled else model.disable_adapter():
                total = total + run(each).square().sum()
        return torch.autograd.grad(total, each)[0]

    expected = gradient((model, False)) + gradient((model, True))
    for order in ((False, True), (True, False)):
        # the layers of a compiled model each write for themselves, those of another write for the whole pass
        got = gradient(*((model if enabled else compiled, enabled) for enabled in order))
        torch.testing.assert_close(got, expected)


def test_a_layer_that_was_compiled_before_its_adapter_had_a_mask():
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = SpftConfig(density=0.3, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), config).to(DEVICE)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(4, 5, device=DEVICE)

    def plain():
        with model.disable_adapter():
            return compiled(x).square().sum()

    def adapted():
        return model(x).square().sum()

    def gradient(*losses):
        return torch.autograd.grad(sum(loss() for loss in losses), x)[0]

    x.requires_grad_()
    gradient(plain)
    fill_randomly(model.base_model, "default")
    expected = gradient(plain) + gradient(adapted)
    for losses in ((plain, adapted), (adapted, plain)):
        torch.testing.assert_close(gradient(*losses), expected)


def test_two_adapters_of_which_one_leaves_layers_as_they_are():
    model = with_adapter(tiny_llama(), adapter_name="few", target_modules=["q_proj", "v_proj"])
    model.add_adapter("all", SpftConfig(density=0.1, init_weights=False))
    passes = Passes(model)

    def with_only(name):
        def loss():
            model.set_adapter(name)
            y = passes.adapted()
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_("spft_values" in parameter_name)
            return y

        return loss

    passes.check(with_only("few"), with_only("all"))


@pytest.mark.parametrize("kind", ["llama", "conv1d", "tied head"])
def test_a_gradient_penalty_without_the_adapter(kind):
    """What is differentiated twice is the base model, also beside a forward pass with S, which is so once."""
    passes = Passes(MODELS[kind]())
    base = {"llama": tiny_llama, "conv1d": tiny_gpt2, "tied head": lambda: tiny_llama(tie_word_embeddings=True)}[kind]()
    x = passes.front(passes.features).detach().requires_grad_()
    labels = token_batch()["labels"]

    def penalty(model):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=x, labels=labels).loss, x, create_graph=True)
        return gradient.square().sum()

    def adapted():
        return passes.model(inputs_embeds=x, labels=labels).loss

    (expected,) = torch.autograd.grad(penalty(base), x)
    for _ in range(2):
        (with_s,) = torch.autograd.grad(adapted(), x)
        with passes.model.disable_adapter():
            found = penalty(passes.model)
        torch.testing.assert_close(torch.autograd.grad(found, x, retain_graph=True)[0], expected)
        both = torch.autograd.grad(found + adapted(), x)[0]
        torch.testing.assert_close(both, expected + with_s)


def test_torch_func_without_the_adapter():
    model = with_adapter(tiny_llama())
    x = torch.randn(2, 5, 36, device=DEVICE)

    def logits(model):
        return lambda x: model(inputs_embeds=x).logits.square().mean()

    direction = torch.ones_like(x)
    for transformed in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (direction,))[1]):
        expected = transformed(logits(tiny_llama()))(x)
        with model.disable_adapter():
            torch.testing.assert_close(transformed(logits(model))(x), expected)


def test_an_evaluation_without_gradients_runs_the_base_layer_itself():
    model = with_adapter(tiny_llama())
    layer = next(module for module in model.modules() if hasattr(module, "spft_values"))
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(0))
    with model.disable_adapter(), torch.no_grad():
        model(**token_batch())
    assert calls
