"""A base, or a whole model, that accelerate offloads to the host or the disk computes what it computes otherwise."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.state import spft_layers
from tests.models import logits, tiny_gpt2, tiny_llama, tiny_qwen2, token_batch, with_adapter

CPU = torch.device("cpu")


def offload(model: nn.Module, kind: str, folder) -> nn.Module:
    if kind == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif kind == "cpu with buffers":
        cpu_offload(model, execution_device=CPU, offload_buffers=True)
    elif kind == "disk":
        disk_offload(model, str(folder / "offloaded"), execution_device=CPU)
    else:
        # every second part of the model
        tops = [name for name, _ in _parts(model)]
        device_map = {name: ("disk" if number % 2 else "cpu") for number, name in enumerate(tops)}
        dispatch_model(
            model, device_map=device_map, main_device="cpu", offload_dir=str(folder / "offloaded"), force_hooks=True
        )
    return model


def _parts(model: nn.Module, prefix: str = ""):
    """Modules that cover the model, one for each layer."""
    for name, child in model.named_children():
        if any(isinstance(module, nn.ModuleList) for module in child.modules()):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


OFFLOADS = ["cpu", "cpu with buffers", "disk", "dispatch"]


@pytest.mark.parametrize("kind", ["cpu", "cpu with buffers", "disk"])
def test_one_layer_with_three_values(kind, tmp_path):
    torch.manual_seed(0)
    config = SpftConfig(num_values=3, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4, bias=False)), config)
    layer = model.base_model.model[0]
    layer.set_mask("default", mask_from_positions(torch.tensor([1, 9, 30]), 4, 8), torch.randn(3))
    x = torch.ones(2, 8)
    expected = [model(x), model(x)][-1]
    base = layer.get_base_weight().clone()
    offload(model, kind, tmp_path)
    assert layer.base_layer.weight.is_meta
    for _ in range(3):
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    assert layer.base_layer.weight.is_meta
    assert torch.equal(layer.get_base_weight(), base)
    with model.disable_adapter():
        assert torch.equal(model(x), x @ base.t())
    with pytest.raises(SpftError, match="values of adapter `default` are offloaded, so they cannot be trained"):
        model(x).sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("merge", ["layer by layer", "by PEFT", "before it is offloaded"])
@pytest.mark.parametrize("kind", ["cpu", "cpu with buffers", "disk"])
def test_a_merged_adapter_of_an_offloaded_model(kind, merge, tmp_path):
    """accelerate brings in what was merged, and W again once it is undone, which a disabled adapter does by itself."""
    model = with_adapter(tiny_gpt2()).eval()
    layers = adapted_layers(model).values()
    expected, base = logits(model), [layer.get_base_weight().clone() for layer in layers]
    if merge == "before it is offloaded":
        model.merge_adapter()
    offload(model, kind, tmp_path)
    if merge == "by PEFT":
        model.merge_adapter()
    elif merge == "layer by layer":
        for layer in layers:
            layer.merge(safe_merge=True)
    assert all(layer.get_base_layer().weight.is_meta for layer in layers)
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_gpt2()))
    assert torch.equal(logits(model), expected)
    assert all(map(torch.equal, base, [layer.get_base_weight() for layer in layers]))


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_an_adapted_model_that_is_offloaded(make, kind, tmp_path):
    model = with_adapter(make(), task_type="CAUSAL_LM").eval()
    ids = token_batch()["input_ids"]
    expected, tokens = logits(model), model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    offload(model if kind != "dispatch" else model.base_model.model, kind, tmp_path)
    assert any(layer.get_base_layer().weight.is_meta for layer in adapted_layers(model).values())
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_adapter_on_a_base_that_is_offloaded_is_selected_trained_and_loaded(kind, tmp_path):
    saved = with_adapter(tiny_llama())
    saved.save_pretrained(tmp_path / "adapter")
    config = SpftConfig(density=0.1, samples=2)
    plain, model = (get_peft_model(base, config) for base in (tiny_llama(), offload(tiny_llama(), kind, tmp_path)))
    losses = []
    for each in (plain, model):
        select_mask(each, [token_batch()])
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = each(**token_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    assert losses[2] < losses[0]
    for one, other in zip(adapted_layers(plain).values(), adapted_layers(model).values()):
        assert torch.equal(one.mask("default").columns, other.mask("default").columns)
    loaded = PeftModel.from_pretrained(offload(tiny_llama(), kind, tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(saved))
    loaded.load_adapter(tmp_path / "adapter", "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(saved))


def test_synflow_names_the_modules_that_are_offloaded(tmp_path):
    model = get_peft_model(offload(tiny_llama(), "cpu", tmp_path), SpftConfig(density=0.1, salience="synflow"))
    with pytest.raises(SpftError, match=r"accelerate brings offloaded weights in for \(.*embed_tokens"):
        select_mask(model, None)


def test_an_adapter_that_is_added_to_an_offloaded_model(tmp_path):
    model = with_adapter(tiny_llama())
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    offload(model, "cpu with buffers", tmp_path)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    model.load_adapter(tmp_path / "adapter", "second")
    for name in ("second", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)


def test_a_quantized_model_that_is_offloaded(tmp_path):
    from tests.tuner.test_quantized import quantize

    model = with_adapter(quantize(tiny_llama(hidden_size=64, intermediate_size=64), "4bit")).eval()
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    offload(model, "cpu", tmp_path)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    for merge in (model.merge_adapter, model.merge_and_unload, next(iter(adapted_layers(model).values())).merge):
        with pytest.raises(SpftError, match="a quantized base layer that is offloaded cannot be merged"):
            merge()
        assert torch.equal(logits(model), expected)
    late = offload(quantize(tiny_llama(hidden_size=64, intermediate_size=64), "4bit"), "cpu", tmp_path)
    with pytest.raises(SpftError, match="a 4-bit base layer was offloaded before it got its adapter"):
        logits(with_adapter(late))


def test_original_weights_that_are_offloaded_are_in_the_state_dict(tmp_path):
    model = with_adapter(tiny_llama())
    for layer in adapted_layers(model).values():
        layer.set_originals("default", torch.randn(layer.mask("default").nnz))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "spft_originals" in name}
    offload(model, "cpu with buffers", tmp_path)
    state = model.state_dict()
    assert len(before) == 14 and all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_tensors_without_memory_are_refused_by_name():
    model = with_adapter(tiny_llama())
    logits(model)
    layer = next(iter(spft_layers(model).values()))
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
    for _ in range(2):
        with pytest.raises(SpftError, match=r"`weight` \(\d+, \d+\) lies on the meta device"):
            logits(model)
    model = with_adapter(tiny_llama())
    layer = next(iter(spft_layers(model).values()))
    layer.spft_values.to("meta")
    with pytest.raises(SpftError, match="adapter `default` lies on the meta device"):
        logits(model)
    model = with_adapter(tiny_llama())
    next(iter(spft_layers(model).values())).spft_columns.to("meta")
    with pytest.raises(SpftError, match="adapter `default` lies on the meta device"):
        logits(model)
