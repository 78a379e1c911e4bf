"""Sparse deltas on the weights of experts, which are parameters of three dimensions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from axolotl_spft import SpftConfig
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.ops.experts import ExpertUse
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.ops.weight.stacked import as_matrix
from axolotl_spft.plugin.module_names import check_module_names
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from tests.experts import (
    EXPERT_MODELS,
    N_EXPERTS,
    PARAMETERS,
    four_bit_experts,
    tiny_gpt_oss,
    tiny_mixtral,
    tiny_qwen2_moe,
)
from tests.models import logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter


def adapted(make=tiny_mixtral, seed: int = 0, **options) -> nn.Module:
    """With random values on the experts alone."""
    return with_adapter(make(), seed, **({"target_parameters": PARAMETERS, "target_modules": []} | options))


def experts_of(model: nn.Module) -> dict[str, ExpertMatrix]:
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, ExpertMatrix)}


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return model(**token_batch(seed=seed)).loss


def gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(model, seed).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", list(EXPERT_MODELS))
def test_every_verb_of_peft(family, tmp_path):
    make = EXPERT_MODELS[family]
    plain, model = make(), adapted(make)
    start, before = weights_of(model), logits(plain)
    layers = experts_of(model)
    assert set(layers) == {
        name for name, p in plain.named_parameters() if p.ndim == 3 and name.endswith(tuple(PARAMETERS))
    }
    wide = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    hidden, width = plain.config.hidden_size, layers[next(iter(layers))].out_features // N_EXPERTS
    assert set(wide.values()) == {(N_EXPERTS * width, hidden), (N_EXPERTS * hidden, width // 2)}

    with_delta = logits(model)
    assert (with_delta - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert same_weights(model, start)

    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(logits(merged), with_delta, rtol=1e-5, atol=1e-5)
    merged.unmerge_adapter()
    assert same_weights(merged, start)
    unloaded = merged.merge_and_unload()
    assert type(unloaded.get_submodule(next(iter(layers)).rpartition(".")[0])).__name__.endswith("Experts")
    torch.testing.assert_close(logits(unloaded), with_delta, rtol=1e-5, atol=1e-5)
    for name, layer in layers.items():
        expected = as_matrix(start[_base_key(name)], layer.transposed) + layer.get_delta_weight("default")
        torch.testing.assert_close(as_matrix(unloaded.get_parameter(name), layer.transposed), expected)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), with_delta)
    torch.testing.assert_close(gradients(loaded), gradients(model))
    empty = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty), with_delta)

    # a second adapter on one of the parameters, both at once, and their weighted sum
    model.add_adapter("other", SpftConfig(init_weights=False, density=0.1, target_modules=[],
                                          target_parameters=PARAMETERS[1:]))  # fmt: skip
    deltas = {name: {a: layer.get_delta_weight(a) for a in layer.spft_values} for name, layer in layers.items()}
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    by_hand = make()
    with torch.no_grad():
        for name, layer in layers.items():
            weight = by_hand.get_parameter(name)
            of_expert = sum(deltas[name].values()).view(N_EXPERTS, -1, layer.in_features)
            weight += of_expert.transpose(1, 2) if layer.transposed else of_expert
    torch.testing.assert_close(both, logits(by_hand), rtol=1e-5, atol=1e-5)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), with_delta) and same_weights_of_base(model, start)


def _base_key(name: str) -> str:
    owner, _, last = name.rpartition(".")
    return f"base_model.model.{owner}.base_layer.{last}"


def same_weights_of_base(model: nn.Module, start: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], weight) for name, weight in start.items() if "spft_" not in name)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
@pytest.mark.parametrize("how", ["checkpoint", "reentrant", "shared", "grouped", "batched", "bf16"])
def test_the_gradient_is_that_of_the_dense_weight(make, how):
    """However the experts are computed, and wherever W + S stands while they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "head_dim": 16} if how == "grouped" else {}
    implementation = {"grouped": "grouped_mm", "batched": "batched_mm"}.get(how, "eager")
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    model = adapted(lambda: make(implementation, dtype, **sizes))
    layers = experts_of(model)
    if how in ("checkpoint", "reentrant"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "shared":
        for layer in layers.values():
            layer.share_weight(True)
    assert all(layer.in_place == (how != "shared") for layer in layers.values())
    start = weights_of(model)
    model.train()
    found = gradients(model)
    assert same_weights(model, start)
    dense = make(implementation, dtype, **sizes).train()
    with torch.no_grad():
        for name, layer in layers.items():
            of_expert = layer.get_delta_weight("default").view(N_EXPERTS, -1, layer.in_features)
            dense.get_parameter(name).add_(of_expert.transpose(1, 2) if layer.transposed else of_expert)
    loss_of(dense).backward()
    for name, layer in layers.items():
        expected = as_matrix(dense.get_parameter(name).grad, layer.transposed).flatten()
        at = positions(layer.mask("default"), layer.in_features)
        gradient = found[f"base_model.model.{name}.spft_values.default"]
        tolerance = {"rtol": 5e-2, "atol": 5e-3} if how == "bf16" else {}
        torch.testing.assert_close(gradient, expected[at].to(gradient.dtype), **tolerance)
        # the expert without tokens has values, and a gradient of 0
        idle = at < layer.out_features // N_EXPERTS * layer.in_features
        assert idle.any() and (gradient[idle] == 0).all() and (gradient[~idle] != 0).any()


def test_the_experts_one_by_one_need_no_gradient_of_all(monkeypatch):
    asked, add = [], ExpertUse.add

    def noted(use, gradient, expert):
        asked.append((gradient.ndim, expert))
        add(use, gradient, expert)

    monkeypatch.setattr(ExpertUse, "add", noted)
    gradients(adapted(tiny_qwen2_moe))
    assert {ndim for ndim, _ in asked} == {2} and {expert for _, expert in asked} <= set(range(1, N_EXPERTS))


def test_passes_of_different_adapters_before_their_backward_passes():
    model = adapted(seed=0)
    other = SpftConfig(init_weights=False, density=0.2, target_modules=[], target_parameters=PARAMETERS)
    model.add_adapter("other", other)
    start, alone = weights_of(model), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = gradients(model)
    for parameter in model.parameters():
        parameter.grad = None
    losses = []
    for name in ("default", "other"):
        model.set_adapter(name)
        losses.append(loss_of(model))
    model.base_model.set_adapter(["default", "other"])
    sum(losses).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, alone["default"] | alone["other"])
    assert same_weights(model, start)


def test_a_merge_between_a_forward_pass_and_its_backward_pass_is_refused():
    model = adapted()
    start = weights_of(model)
    loss = loss_of(model)
    model.merge_adapter()
    with pytest.raises(SpftError, match="of the experts was merged or moved between a forward pass and its backward"):
        loss.backward()
    model.unmerge_adapter()
    assert same_weights(model, start)
    gradients(model)


def test_a_frozen_adapter_lets_gradients_through():
    model = adapted()
    for layer in experts_of(model).values():
        layer.spft_values["default"].requires_grad_(False)
    model.enable_input_require_grads()
    embedded = {}
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: embedded.update(y=y) or y.retain_grad())
    loss_of(model).backward()
    merged = model.merge_and_unload()
    found = embedded["y"].grad.clone()
    merged.enable_input_require_grads()
    loss_of(merged).backward()
    torch.testing.assert_close(found, embedded["y"].grad)


def test_four_bit_experts():
    for make in (tiny_mixtral, tiny_gpt_oss):
        dense = four_bit_experts(make())
        model = adapted(lambda make=make: four_bit_experts(make()))
        layers = experts_of(model)
        assert len(layers) == 4
        with_delta = logits(model)
        found = gradients(model)
        # the same weights dequantized, in plain parameters
        plain = make()
        with torch.no_grad():
            for name, layer in layers.items():
                plain.get_parameter(name).copy_(layer.stored_weight)
        reference = adapted(lambda plain=plain: plain)
        torch.testing.assert_close(with_delta, logits(reference))
        torch.testing.assert_close(found, gradients(reference))
        with torch.nn.utils.parametrize.cached():
            # somebody else has torch keep what parametrized weights are
            assert torch.equal(logits(model), with_delta)
            with model.disable_adapter():
                torch.testing.assert_close(logits(model), logits(dense))
            assert torch.equal(logits(model), with_delta)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(dense))
        with pytest.raises(SpftError, match="quantized by a parametrization, into which nothing can be merged"):
            model.merge_adapter()


def test_all_linear_says_which_experts_it_leaves_untrained():
    count = sum(p.numel() for p in tiny_mixtral().parameters() if p.ndim == 3)
    said = (
        r"takes linear layers alone and leaves the experts untrained: model\.layers\.0\.mlp\.experts\.gate_up_proj, .* "
        rf"\({count:,} weights, \d+\.\d% of the model\); to train them add "
        r"`target_parameters: \[experts\.down_proj, experts\.gate_up_proj\]`"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        get_peft_model(tiny_mixtral(), SpftConfig())
    assert len([each for each in caught if "experts untrained" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_mixtral(), SpftConfig(target_parameters=PARAMETERS))
        get_peft_model(tiny_llama(), SpftConfig())


def test_names_that_are_no_experts_are_refused_with_what_to_write():
    for name, said in (
        ("experts.up", r"matches no parameter of the MixtralForCausalLM: name some of experts\.down_proj, experts\.g"),
        ("q_proj.weight", r"of 2 dimensions \(28, 28\).*`target_modules: \[model\.layers\.0\.self_attn\.q_proj\]`"),
    ):
        with pytest.raises(SpftError, match=said):
            get_peft_model(tiny_mixtral(), SpftConfig(target_parameters=[name]))
        with pytest.raises(SpftConfigError, match=said):
            check_module_names({"target_parameters": [name]}, tiny_mixtral())
    with pytest.raises(SpftError, match="has none of three dimensions, so leave the key out"):
        get_peft_model(tiny_llama(), SpftConfig(target_parameters=PARAMETERS))
    with pytest.raises(SpftConfigError, match=r"`target_parameters: experts.down_proj` must be a list"):
        SpftConfig(target_parameters="experts.down_proj")
    with pytest.raises(SpftConfigError, match=r"`target_modules: \[\]` must be"):
        SpftConfig(target_modules=[])
    lora = get_peft_model(tiny_mixtral(), LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(TypeError, match=r"experts\.gate_up_proj` is adapted by a peft\..*ParamWrapper already"):
        get_peft_model(lora.base_model.model, SpftConfig(target_parameters=PARAMETERS))


def test_layers_and_exclusions_choose_among_experts_too():
    model = adapted(layers_to_transform=[1])
    assert {name.split(".")[2] for name in experts_of(model)} == {"1"} and len(experts_of(model)) == 2
    model = adapted(exclude_modules=["experts.down_proj"])
    assert {layer.parameter_name for layer in experts_of(model).values()} == {"gate_up_proj"}
    model = adapted(exclude_modules=r"model\.layers\.0\.mlp\.experts")
    assert {name.split(".")[2] for name in experts_of(model)} == {"1"}


def test_experts_beside_heads_and_shared_experts_are_saved_and_loaded(tmp_path):
    model = adapted(tiny_qwen2_moe, target_modules=["lm_head", "q_proj", "down_proj"])
    names = set(adapted_layers(model))
    assert {"lm_head", "model.layers.0.mlp.shared_expert.down_proj", "model.layers.0.mlp.experts.down_proj"} < names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2_moe(), tmp_path)
    assert set(adapted_layers(loaded)) == names and torch.equal(logits(loaded), logits(model))


def test_what_is_saved_in_the_midst_of_a_pass_is_w():
    model = adapted()
    start, caught = weights_of(model), {}
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    experts.register_forward_hook(lambda *_: caught.update(weights_of(model)))
    loss_of(model).backward()
    assert all(torch.equal(weight, start[name]) for name, weight in caught.items()) and caught


def test_a_kernel_that_may_give_no_gradient_is_refused_where_one_is_needed():
    model = adapted()
    expected = logits(model)
    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            module.config._experts_implementation_internal = "sonicmoe"
            with pytest.raises(
                SpftError, match=r"`experts_implementation: sonicmoe` .* use eager, batched_mm, grouped"
            ):
                loss_of(model)
            module.config._experts_implementation_internal = "eager"
    assert torch.equal(logits(model), expected)


def test_rows_with_adapters_of_their_own_are_refused():
    model = adapted().eval()
    with pytest.raises(SpftError, match=r"`adapter_names` cannot be given to .*experts\.down_proj"):
        model(input_ids=token_batch()["input_ids"], adapter_names=["default", "__base__"])


def test_the_experts_other_attributes_are_theirs():
    model = adapted()
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts.num_experts == N_EXPERTS and experts.act_fn is experts.base_layer.act_fn
    with pytest.raises(AttributeError):
        experts.nothing  # noqa: B018
