"""The PEFT method: targets, several adapters, and every verb that PEFT's tuners have."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import merge_utils
from torch import nn

from axolotl_spft import SpftConfig, SpftModel, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from tests.models import (
    ARCHITECTURES,
    logits,
    same_weights,
    tiny_gpt2,
    tiny_llama,
    token_batch,
    weights_of,
    with_adapter,
)

ATTENTION = {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ATTENTION),
        ({"target_modules": r".*\.self_attn\.[qv]_proj"}, ATTENTION),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {"model.layers.0.self_attn.q_proj"}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {a for a in ATTENTION if "q_" in a}),
        (
            {"exclude_modules": r".*mlp.*", "layers_to_transform": [1], "layers_pattern": "layers"},
            {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"},
        ),
        ({"exclude_modules": r".*(k_proj|o_proj|mlp).*"}, ATTENTION),
    ],
)
def test_targets(options, expected):
    model = get_peft_model(tiny_llama(), SpftConfig(**options))
    assert isinstance(model.base_model, SpftModel)
    assert set(adapted_layers(model)) == expected


@pytest.mark.parametrize(("architecture", "per_layer"), [("llama", 7), ("qwen2", 7), ("gpt2", 4), ("moe", 9)])
def test_all_linear_takes_every_linear_layer_but_the_head(architecture, per_layer):
    # the mixture of experts: attention, the router is no linear layer, the shared expert and its gate
    model = get_peft_model(ARCHITECTURES[architecture](), SpftConfig(task_type=TaskType.CAUSAL_LM))
    names = set(adapted_layers(model))
    assert not any("lm_head" in name for name in names)
    linear = {
        name
        for name, module in ARCHITECTURES[architecture]().named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    assert names == linear
    assert len(names) <= 2 * per_layer


def test_a_target_of_another_kind_is_refused_by_name():
    with pytest.raises(TypeError, match=r"`model.norm` is a LlamaRMSNorm, which is not supported"):
        get_peft_model(tiny_llama(), SpftConfig(target_modules=["model.norm"]))


def test_a_new_adapter_is_empty_and_changes_nothing():
    before = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), SpftConfig())
    assert torch.equal(logits(model), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0


@pytest.mark.parametrize("budget", [{"density": 0.03}, {"num_values": 101}, {"match_lora_rank": 1}])
def test_random_initialization_has_the_budget(budget):
    model = (
        with_adapter(tiny_llama(), density=None, **budget)
        if "density" not in budget
        else with_adapter(tiny_llama(), **budget)
    )
    layers = list(adapted_layers(model).values())
    entries = sum(layer.out_features * layer.in_features for layer in layers)
    rank_one = sum(layer.out_features + layer.in_features for layer in layers)
    expected = {"density": round(0.03 * entries), "num_values": 101, "match_lora_rank": rank_one}[next(iter(budget))]
    assert sum(layer.mask("default").nnz for layer in layers) == expected
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == expected


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_verb_restores_the_base_bit_for_bit(architecture, dtype):
    before = weights_of(ARCHITECTURES[architecture](dtype))
    base_logits = logits(ARCHITECTURES[architecture](dtype))
    base = ARCHITECTURES[architecture](dtype)
    model = with_adapter(base)
    adapted = logits(model)
    assert not torch.equal(adapted, base_logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), adapted)

    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        merged = logits(model)
        assert (merged - adapted).abs().max() <= tolerance * adapted.abs().max()
        model.unmerge_adapter()
        assert torch.equal(logits(model), adapted)

    model.unload()
    assert not any(isinstance(module, SpftLinear) for module in base.modules())
    assert same_weights(base, before)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_merge_and_unload_is_a_plain_model(architecture):
    model = with_adapter(ARCHITECTURES[architecture]())
    adapted = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, SpftLinear) for module in plain.modules())
    assert plain.state_dict().keys() == ARCHITECTURES[architecture]().state_dict().keys()
    assert (logits(plain) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def test_disabling_while_merged_gives_the_base():
    base_logits = logits(tiny_llama())
    model = with_adapter(tiny_llama())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)


def test_safe_merge_refuses_a_broken_adapter_and_changes_nothing():
    model = with_adapter(tiny_llama())
    layer = next(reversed(adapted_layers(model).values()))
    layer.spft_values["default"].data[0] = float("nan")
    before = layer.get_base_weight().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before)
    assert not layer.merged


def test_several_adapters_each_and_together():
    base_logits = logits(tiny_llama())
    model = with_adapter(tiny_llama(), seed=1)
    first = logits(model)
    torch.manual_seed(2)
    model.add_adapter("other", SpftConfig(init_weights=False, density=0.2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    other = logits(model)
    alone = with_adapter(tiny_llama(), seed=2, density=0.2, target_modules=["q_proj", "down_proj"])
    assert torch.equal(other, logits(alone))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    dense = tiny_llama()
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            weight = dense.get_submodule(name).weight
            for adapter in ("default", "other"):
                if adapter in layer.spft_values:
                    weight += layer.get_delta_weight(adapter)
    assert (together - logits(dense)).abs().max() <= 1e-5 * together.abs().max()
    model.base_model.merge_adapter(["default", "other"])
    assert (logits(model) - together).abs().max() <= 1e-5 * together.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), together)

    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model), base_logits)


def test_training_several_adapters_together():
    model = with_adapter(tiny_llama(), seed=1)
    torch.manual_seed(2)
    model.add_adapter("other", SpftConfig(init_weights=False, density=0.2))
    model.base_model.set_adapter(["default", "other"])
    model(**token_batch()).loss.backward()
    dense = copy.deepcopy(model)
    plain = dense.merge_and_unload(adapter_names=["default", "other"])
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(**token_batch()).loss.backward()
    for name, layer in adapted_layers(model).items():
        gradient = plain.get_submodule(name).weight.grad
        for adapter in ("default", "other"):
            at = layer.storage_positions(layer.mask(adapter)).long()
            expected = gradient.flatten()[at]
            assert (layer.spft_values[adapter].grad - expected).abs().max() <= 1e-4 * gradient.abs().max()


def test_modules_to_save_are_trained_beside_the_values(tmp_path):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.1, modules_to_save=["lm_head"]))
    select_mask(model, [token_batch(rows=8)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    model(**token_batch()).loss.backward()
    optimizer.step()
    assert not torch.equal(head, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again.merge_and_unload()), logits(model.merge_and_unload()))


def test_inject_adapter_in_a_plain_model():
    model = inject_adapter_in_model(SpftConfig(init_weights=False, density=0.1, target_modules=["c_attn"]), tiny_gpt2())
    assert not torch.equal(logits(model), logits(tiny_gpt2()))


def test_a_plain_stack_of_layers():
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3, bias=False))
    x = torch.randn(4, 5)
    expected = stack(x)
    model = get_peft_model(stack, SpftConfig(target_modules=["0", "2"], num_values=7))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    select_mask(model, [{"input": x}], lambda model, batch: model(batch["input"]).square().sum())
    assert sum(layer.mask("default").nnz for layer in adapted_layers(model).values()) == 7


def test_a_weighted_sum_of_adapters():
    model = with_adapter(tiny_llama(), adapter_name="a", target_modules=["q_proj", "up_proj"])
    model.add_adapter("b", SpftConfig(target_modules=["q_proj", "down_proj"], init_weights=False, density=0.2))
    layers, x = adapted_layers(model), token_batch()
    expected = {}
    for name, layer in layers.items():
        each = [(weight, layer.get_delta_weight(one)) for one, weight in (("a", 0.5), ("b", -2.0))
                if one in layer.spft_values]  # fmt: skip
        expected[name] = sum(weight * dense for weight, dense in each)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    assert model.active_adapter == "a"
    assert not any(layer.spft_values["sum"].requires_grad for layer in layers.values())
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected[name])
    model.set_adapter("sum")
    model(**x).loss.backward()
    assert model.peft_config["sum"].nnz == sum(layer.spft_values["sum"].grad.numel() for layer in layers.values())


def test_a_weighted_sum_is_saved_and_loaded(tmp_path):
    model = with_adapter(tiny_llama(), adapter_name="a")
    model.add_weighted_adapter(["a", "a"], [0.5, 0.25], "sum")
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")), expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["a", "c"], [1, 1], "sum"), "must name adapters of this model, which are ['a', 'b']"),
        ((["a", "b"], [1], "sum"), "2 adapters, but 1 weights"),
        ((["a"], [float("nan")], "sum"), "`weights: [nan]` must be finite numbers"),
        ((["a"], [1], "sum", "svd"), "`combination_type: svd` must be one of linear, ties, dare_linear"),
        ((["a"], [1], "sum", "linear", 0.5), "`density: 0.5` must be"),
        ((["a"], [1], "sum", "ties", 0), "`density: 0` must be a number in (0, 1]"),
        ((["a"], [1], "sum", "ties", 1, "none"), "`majority_sign_method: none` must be total or frequency"),
        ((["b"], [1], "sum"), "hold no values yet"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_and_changes_nothing(arguments, said):
    model = with_adapter(tiny_llama(), adapter_name="a")
    model.add_adapter("b", SpftConfig())
    with pytest.raises(SpftError, match=re.escape(said)):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"}


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_combinations_are_those_of_peft_at_the_positions_of_all(method):
    """Without pruning PEFT's functions give the same of dense matrices, and 0 where no adapter has a position."""
    model = with_adapter(tiny_llama(), adapter_name="a", density=0.4)
    model.add_adapter("b", SpftConfig(init_weights=False, density=0.4))
    model.add_weighted_adapter(["a", "b", "a"], [0.5, -2.0, 1.0], "sum", method, density=1.0)
    model.add_weighted_adapter(["a", "b"], [1, 1], "pruned", method, density=0.5)
    for layer in adapted_layers(model).values():
        dense = [layer.get_delta_weight(name) for name in ("a", "b", "a")]
        expected = getattr(merge_utils, method)(dense, torch.tensor([0.5, -2.0, 1.0]), density=1.0)
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
        kept = layer.get_delta_weight("pruned")
        assert 0 < (kept != 0).sum() < (layer.get_delta_weight("sum") != 0).sum()
    assert model.peft_config["pruned"].mask_source["combination_type"] == method


def test_a_sum_of_a_name_that_is_taken_changes_nothing():
    model = with_adapter(tiny_llama(), adapter_name="a")
    model.add_adapter("b", SpftConfig(init_weights=False))
    before = weights_of(model)
    with pytest.warns(UserWarning, match="there is an adapter `b` already, which stays as it is"):
        model.add_weighted_adapter(["a"], [2.0], "b")
    assert same_weights(model, before)


def test_no_sum_of_a_merged_adapter():
    model = with_adapter(tiny_llama(), adapter_name="a")
    model.merge_adapter()
    with pytest.raises(SpftError, match=r"merged: call unmerge_adapter\(\) first"):
        model.add_weighted_adapter(["a"], [1], "sum")


def test_a_saved_adapter_is_loaded_by_peft_only(tmp_path):
    with_adapter(tiny_llama()).save_pretrained(tmp_path)
    plain = tiny_llama()
    before = weights_of(plain)
    with pytest.raises(SpftError, match=r"`default` is a saved SPFT adapter of .*PeftModel.from_pretrained\(model"):
        plain.load_adapter(str(tmp_path))
    with pytest.raises(SpftError, match="saved SPFT adapter"):
        inject_adapter_in_model(SpftConfig.from_pretrained(tmp_path), plain)
    assert same_weights(plain, before)


@pytest.mark.parametrize("autocast", [True, False])
def test_values_keep_the_dtype_that_was_chosen_when_their_adapter_is_loaded_again(tmp_path, autocast):
    torch.manual_seed(0)
    options = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(tiny_llama(torch.bfloat16), SpftConfig(init_weights=False, density=0.1), **options)
    model.save_pretrained(tmp_path)

    def dtypes(model) -> set[torch.dtype]:
        return {layer.spft_values["default"].dtype for layer in adapted_layers(model).values()}

    chosen = {torch.float32 if autocast else torch.bfloat16}
    assert dtypes(model) == chosen
    # as a trainer resumes
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert dtypes(model) == chosen
    assert dtypes(PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path, **options)) == chosen
    model.delete_adapter("default")
    model.add_adapter("default", SpftConfig(init_weights=False, density=0.1))
    assert dtypes(model) == {torch.float32}


def test_another_adapter_of_the_same_name_is_told_from_a_damaged_file(tmp_path):
    with_adapter(tiny_llama(), density=0.05).save_pretrained(tmp_path)
    model = with_adapter(tiny_llama())
    with pytest.raises(
        SpftError, match=r"if that is another adapter of the same name, delete_adapter\('default'\) first"
    ):
        model.load_adapter(tmp_path, "default")


def test_adapters_that_wait_for_their_mask_are_trained_after_it():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05), "a")
    model.add_adapter("b", SpftConfig(density=0.05))
    for name in ("a", "b"):
        model.set_adapter(name)
        select_mask(model, [token_batch()])
        model(**token_batch()).loss.backward()
        for layer in adapted_layers(model).values():
            assert layer.spft_values[name].grad.any()


def test_the_mask_cannot_change_while_merged():
    model = with_adapter(tiny_llama())
    model.merge_adapter()
    layer = next(iter(adapted_layers(model).values()))
    with pytest.raises(SpftError, match="call unmerge_adapter"):
        layer.set_mask("default", layer.mask("default"))


def test_layers_print_their_counts():
    assert "nnz={default: " in repr(with_adapter(tiny_llama()))


def test_adapters_of_one_config_record_each_its_own(tmp_path):
    config = SpftConfig(density=0.1, samples=2)
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("second", model.peft_config["default"])
    select_mask(model, [token_batch()])
    recorded = model.peft_config
    assert recorded["default"].nnz == sum(layer.mask("default").nnz for layer in adapted_layers(model).values())
    assert (recorded["second"].nnz, recorded["second"].base_shapes, recorded["second"].mask_source) == (None,) * 3
    model.save_pretrained(tmp_path)
    assert model.load_adapter(tmp_path / "second", "again").unexpected_keys == []
    assert not any(layer.mask("again").nnz for layer in adapted_layers(model).values())
