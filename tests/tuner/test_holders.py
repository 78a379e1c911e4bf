"""Base weights that several models, or several processes, hold."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing as multiprocessing
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from axolotl_spft import SpftConfig
from axolotl_spft.tuner.state import spft_layers
from tests.experts import PARAMETERS, tiny_mixtral
from tests.interpreter import DEVICE
from tests.models import tiny_llama, token_batch, with_adapter


def llama(base: nn.Module, seed: int) -> nn.Module:
    return with_adapter(base, seed)


def experts(base: nn.Module, seed: int) -> nn.Module:
    return with_adapter(base, seed, target_modules=["q_proj"], target_parameters=PARAMETERS)


def net(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {"density": 0.4, "target_modules": ["0", "1"], "init_weights": False} | options
    return get_peft_model(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), SpftConfig(**options))


def in_place(model: nn.Module) -> list[bool]:
    return [layer.in_place for layer in spft_layers(model).values()]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("make", "adapted"), [(tiny_llama, llama), (tiny_mixtral, experts)])
def test_two_models_over_one_base(make, adapted, later):
    base, twin = make(num_hidden_layers=1), make(num_hidden_layers=1)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    stored = dict(base.named_parameters())
    if later:
        actor = adapted(base, 1)
        [actor(**token_batch()).loss.backward() for _ in range(2)]
    twin.load_state_dict(dict(stored), assign=True)
    critic = adapted(twin, 2)
    if not later:
        actor = adapted(base, 1)
    models = (actor, critic)

    def gradients(run):
        for model in models:
            model.zero_grad()
        run()
        return [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]

    def loss(model):
        return model(**token_batch()).loss

    expected = gradients(lambda: [loss(model).backward() for model in models])
    for order in (models, models[::-1]):
        found = gradients(lambda order=order: sum(loss(model) for model in order).backward())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert all(torch.equal(stored[name], weight) for name, weight in before.items())


def test_a_model_that_is_alone_again_writes_in_place():
    model = net()
    assert all(in_place(model)) and all(in_place(copy.deepcopy(model))) and all(in_place(model))
    kept = list(spft_layers(model).values())
    again = get_peft_model(model.unload(), SpftConfig(density=0.4, target_modules=["0", "1"], init_weights=False))
    assert kept and all(in_place(again))


def passes(model: nn.Module, x: torch.Tensor) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(300):
            model(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that processes share is on the CPU")
def test_processes_that_share_a_model_leave_its_weights():
    model, x = net().eval(), torch.randn(4, 5)
    with torch.no_grad():
        expected = [model(x), model(x)][-1]
    assert all(in_place(model))
    model.share_memory()
    assert not any(in_place(model))
    before = [layer.get_base_layer().weight.clone() for layer in spft_layers(model).values()]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=passes, args=(model, x)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    after = [layer.get_base_layer().weight for layer in spft_layers(model).values()]
    assert all(map(torch.equal, before, after))
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_file_that_is_mapped_for_this_process_alone_is_written(tmp_path):
    model = net()
    save_file({"weight": torch.randn(7, 5)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.randn(7, 5)}, tmp_path / "model.pt")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    layer = model.base_model.model[0]
    for weight in (mapped, torch.load(tmp_path / "model.pt", mmap=True)["weight"]):
        layer.get_base_layer().weight = nn.Parameter(weight, requires_grad=False)
        layer._forget_derived()
        assert layer.in_place
