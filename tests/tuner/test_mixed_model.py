"""`PeftMixedModel` with sparse adapters and LoRA: each computes, merges and trains as by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners import mixed
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SparseMixedModel
from tests.models import logits, same_weights, tiny_gpt2, tiny_llama, tiny_moe, token_batch, weights_of, with_adapter
from tests.tuner.test_quantized import quantize

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
MAKE = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def lora(architecture: str = "llama") -> LoraConfig:
    return LoraConfig(r=3, target_modules=TARGETS[architecture], init_lora_weights=False)


def sparse(architecture: str = "llama", **options) -> SpftConfig:
    # one module of LoRA's, and others
    return SpftConfig(**{"target_modules": [TARGETS[architecture][0], "up_proj", "c_fc"], "density": 0.2,
                         "init_weights": False, **options})  # fmt: skip


def mixed_model(order: tuple[str, ...], architecture: str = "llama", base: nn.Module | None = None) -> PeftMixedModel:
    configs = {"lora": lora(architecture), "spft": sparse(architecture)}
    torch.manual_seed(0)
    model = get_peft_model(base or MAKE[architecture](), configs[order[0]], order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    model.set_adapter(list(order))
    return model.eval()


def dense_twin(model: PeftMixedModel, plain: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The plain model with W + S + BA of these adapters, worked out from each layer's dense delta."""
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                target = plain.get_submodule(".".join(part for part in name.split(".") if part != "base_layer"))
                held = module.spft_values if hasattr(module, "spft_values") else module.lora_A
                for adapter in set(names) & set(held.keys()):
                    delta = module.get_delta_weight(adapter)
                    target.weight.add_(delta if delta.shape == target.weight.shape else delta.t())
    return plain


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [("lora", "spft"), ("spft", "lora")], ids="-".join)
def test_both_together_each_alone_merged_and_unloaded(order, architecture):
    model = mixed_model(order, architecture)
    assert isinstance(model.base_model, SparseMixedModel)
    expected = {
        names: logits(dense_twin(model, MAKE[architecture](), names).eval())
        for names in (("lora", "spft"), ("lora",), ("spft",), ())
    }
    for names in (("lora",), ("spft",), ("lora", "spft")):
        model.set_adapter(list(names))
        assert_close(logits(model), expected[names])
    with model.disable_adapter():
        assert_close(logits(model), expected[()])
    both = expected["lora", "spft"]
    assert min((both - other).abs().max() for names, other in expected.items() if len(names) < 2) > 0.01
    # merging and unmerging each layer by itself, in the order of PEFT's walk; what is not merged is still added
    for names in (None, ["spft"], ["lora"]):
        model.base_model.merge_adapter(adapter_names=names)
        assert_close(logits(model), both)
        model.base_model.unmerge_adapter()
        assert_close(logits(model), both)
    assert_close(logits(copy.deepcopy(model).merge_and_unload()), both)
    assert_close(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["spft"])), expected[("spft",)])
    plain = model.unload()
    assert_close(logits(plain), expected[()])
    assert not any("spft" in name or "lora" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("order", [("lora", "spft"), ("spft", "lora")], ids="-".join)
def test_trained_together_as_dense_weights_are(order):
    model = mixed_model(order).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("spft_values" in name or "lora_" in name for name in trained)
    twin = dense_twin(model, tiny_llama(), order).train()
    model(**token_batch()).loss.backward()
    twin(**token_batch()).loss.backward()
    layers = adapted_layers(model)
    assert len(layers) == 4
    for name, layer in layers.items():
        gradient = twin.get_submodule(name.removesuffix(".base_layer")).weight.grad
        expected = gradient.flatten()[layer.storage_positions(layer.mask("spft"))]
        assert_close(layer.spft_values["spft"].grad, expected, 1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_close(logits(model.eval()), logits(dense_twin(model, tiny_llama(), order).eval()), 1e-4)


def test_a_mask_is_selected_beside_lora_and_later_adapters_are_deleted():
    model = mixed_model(("lora",))
    model.add_adapter("all", SpftConfig(density=0.1))
    assert not any("lm_head" in name for name in adapted_layers(model))
    model.set_adapter(["lora", "all"])
    with pytest.raises(SpftError, match="`all` has no mask"):
        model.train()(**token_batch())
    select_mask(model, [token_batch()], adapter_name="all")
    assert all(layer.mask("all").nnz for layer in adapted_layers(model).values())
    model.add_adapter("more", sparse())
    model.set_adapter(["lora", "more"])
    before = logits(model.eval())
    model.delete_adapter("all")
    model.set_adapter(["lora", "more"])
    assert_close(logits(model), before)
    assert set(model.peft_config) == {"lora", "more"}


def test_mixed_models_without_a_sparse_adapter_are_as_ever():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), lora(), "lora", mixed=True).eval()
    model.add_adapter("loha", LoHaConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False))
    model.set_adapter(["lora", "loha"])
    state, both = model.state_dict(), logits(model)
    assert not any("spft" in name for name in state)
    model.load_state_dict(state)
    model.delete_adapter("loha")
    model.set_adapter(["lora"])
    assert not torch.equal(logits(model), both)
    assert_close(logits(copy.deepcopy(model).merge_and_unload()), logits(model))


def test_experts_in_a_mixed_model_are_refused():
    model = get_peft_model(tiny_moe(), LoraConfig(target_modules=["q_proj"]), "lora", mixed=True)
    with pytest.raises(SpftError, match=r"`target_parameters: \['mlp.experts.down_proj'\]` are not adapted in a mixed"):
        model.add_adapter("spft", SpftConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]))


def test_saved_adapters_are_loaded_together(tmp_path):
    model = with_adapter(tiny_llama(), adapter_name="spft", target_modules=["q_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = get_peft_model(tiny_llama(), lora(), "lora")
    other.save_pretrained(tmp_path)
    loaded = PeftMixedModel.from_pretrained(tiny_llama(), tmp_path / "lora", "lora")
    loaded.load_adapter(tmp_path / "spft", "spft")
    for name, alone in (("spft", model), ("lora", other)):
        loaded.set_adapter([name])
        assert_close(logits(loaded.eval()), logits(alone.eval()))
    first = PeftMixedModel.from_pretrained(tiny_llama(), tmp_path / "spft", "spft").eval()
    assert_close(logits(first), logits(model))
    # alone, the adapter is as ever
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "spft").eval()), logits(model))


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("order", [("lora", "spft"), ("spft", "lora")], ids="-".join)
def test_a_quantized_base(order, repaired):
    base = quantize(tiny_llama(), "4bit")
    before = weights_of(base)
    plain = logits(base.train())
    model = mixed_model(order, base=base).train()
    for layer in adapted_layers(model).values() if repaired else ():
        at = layer.storage_positions(layer.mask("spft"))
        layer.set_originals("spft", layer.get_base_weight().flatten()[at] + 0.1 * torch.randn(len(at)))
    both = logits(model)
    model.set_adapter(["spft"])
    alone = logits(with_same_values(model))
    assert_close(logits(model), alone)
    assert min((both - plain).abs().max(), (both - alone).abs().max()) > 0.01
    if repaired:
        for merge in (model.base_model.merge_adapter, model.merge_and_unload):
            with pytest.raises(SpftError, match="`spft` repairs the quantized base by assigning entries"):
                merge()
    model.unload()
    assert same_weights(base, before)


def with_same_values(model: PeftMixedModel) -> PeftModel:
    """A model of the sparse adapter alone."""
    single = get_peft_model(quantize(tiny_llama(), "4bit"), sparse())
    layers = adapted_layers(single)
    for name, layer in adapted_layers(model).items():
        own = layers[name.removesuffix(".base_layer")]
        own.set_mask("default", layer.mask("spft"), layer.spft_values["spft"].detach())
        own.set_originals("default", layer.originals("spft"))
    return single.train()


def test_the_replaced_class_is_needed():
    """PEFT's own takes no method from outside; once it does, `mixed_model` can go."""
    own = next(kind for kind in SparseMixedModel.__mro__ if kind.__module__ == mixed.model.__name__)
    with pytest.raises(TypeError, match="only supports"):
        own(tiny_llama(), {"default": SpftConfig()}, "default")
