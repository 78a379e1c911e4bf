"""What a model records of its adapters is its own, and merged adapters are named and kept."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.config import RECORDED
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from tests.models import logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter

WIDE = {"hidden_size": 52}


def test_a_configuration_that_two_models_share(tmp_path):
    config = SpftConfig(density=0.05, samples=2, target_modules=["q_proj"])
    models = []
    for options in ({}, WIDE):
        models.append(get_peft_model(tiny_llama(**options), config))
        select_mask(models[-1], [token_batch()])
    assert [getattr(config, name) for name in RECORDED] == [None] * 3
    for model, options, folder in zip(models, ({}, WIDE), "ab"):
        held = sum(layer.mask("default").nnz for layer in adapted_layers(model).values())
        assert model.peft_config["default"].nnz == held
        model.save_pretrained(tmp_path / folder)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(**options), tmp_path / folder)), logits(model))
    assert len({model.peft_config["default"].nnz for model in models}) == 2


def test_a_configuration_that_is_injected_twice():
    config = SpftConfig(density=0.05, target_modules=["q_proj"], init_weights=False)
    for _ in range(2):
        inject_adapter_in_model(config, tiny_llama())
    assert config.nnz is None


def test_a_record_of_another_model_is_not_taken_over(tmp_path):
    """Neither the configuration that a model holds nor one whose adapter was loaded says what another one holds."""
    first = with_adapter(tiny_llama(), target_modules=["q_proj"])
    again = inject_adapter_in_model(first.peft_config["default"], tiny_llama(**WIDE))
    assert first.peft_config["default"].nnz == sum(
        layer.mask("default").nnz for layer in adapted_layers(first).values()
    )
    assert again.peft_config["default"].nnz != first.peft_config["default"].nnz
    first.add_adapter("second", first.peft_config["default"])
    assert first.peft_config["second"] is not first.peft_config["default"]
    first.save_pretrained(tmp_path)
    with pytest.raises(SpftError, match="is a saved SPFT adapter of"):
        inject_adapter_in_model(SpftConfig.from_pretrained(tmp_path), tiny_llama())


def test_the_configuration_of_a_loaded_model_is_used_again(tmp_path):
    """As TRL does for the adapter that it compares a trained one with, and for another base."""
    made = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=2))
    select_mask(made, [token_batch()])
    made.save_pretrained(tmp_path / "made")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "made")
    config = loaded.peft_config["default"]
    loaded.add_adapter("second", config)
    wide = get_peft_model(tiny_llama(**WIDE), config)
    inject_adapter_in_model(config, tiny_llama())
    assert [config.nnz, config.mask_source] == [
        made.peft_config["default"].nnz,
        made.peft_config["default"].mask_source,
    ]
    for model, name in ((loaded, "second"), (wide, "default")):
        assert [getattr(model.peft_config[name], recorded) for recorded in RECORDED] == [None] * 3
    select_mask(wide, [token_batch()])
    wide.save_pretrained(tmp_path / "wide")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(**WIDE), tmp_path / "wide")), logits(wide))


def test_a_saved_configuration_alone_says_nothing_of_what_is_held(tmp_path):
    made = with_adapter(tiny_llama())
    made.save_pretrained(tmp_path / "made")
    model = get_peft_model(tiny_llama(), SpftConfig.from_pretrained(tmp_path / "made"))
    assert [getattr(model.peft_config["default"], name) for name in RECORDED] == [None] * 3
    twin = copy.deepcopy(model)
    select_mask(model, [token_batch()])
    assert model.peft_config["default"].mask_source["salience"] == "gradient"
    # what the file must bring is still known
    twin.peft_config["default"].awaited["nnz"] += 1
    with pytest.raises(SpftError, match="nnz"):
        twin.load_adapter(tmp_path / "made", "default")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "made").peft_config["default"]
    assert [getattr(loaded, name) for name in RECORDED] == [
        getattr(made.peft_config["default"], name) for name in RECORDED
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_a_safe_merge_names_the_adapter_that_is_broken(shared):
    base = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    if shared:
        base[1].weight = nn.Parameter(base[0].weight.data.view(3, 2))
    model = get_peft_model(base, SpftConfig(num_values=4, target_modules=["0", "1"], init_weights=False), "whole")
    model.add_adapter("torn", SpftConfig(num_values=4, target_modules=["0", "1"], init_weights=False))
    layer = adapted_layers(model)["0"]
    assert layer.in_place != shared
    with torch.no_grad():
        layer.spft_values["torn"][0] = torch.nan
    before = weights_of(model)
    for names in (["whole", "torn"], ["torn"]):
        with pytest.raises(ValueError, match="The adapter torn seems to be broken"):
            layer.merge(safe_merge=True, adapter_names=names)
        assert torch.equal(layer.get_base_weight(), before["base_model.model.0.base_layer.weight"])
    layer.merge(safe_merge=True, adapter_names=["whole"])


def test_a_merged_adapter_is_not_deleted():
    model = with_adapter(tiny_llama())
    model.add_adapter("other", SpftConfig(density=0.05, init_weights=False))
    expected, before = logits(model), weights_of(tiny_llama())
    model.merge_adapter()
    merged = logits(model)
    with pytest.raises(SpftError, match=r"adapter `default` is merged: call unmerge_adapter\(\) before delete_adapter"):
        model.delete_adapter("default")
    # nothing has changed, and another adapter may go
    assert torch.equal(logits(model), merged)
    assert set(model.peft_config) == {"default", "other"}
    with pytest.raises(SpftError, match="adapter `default` is merged"):
        next(iter(adapted_layers(model).values())).delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    twin = copy.deepcopy(model)
    model.delete_adapter("default")
    assert same_weights(model.unload(), before)
    assert same_weights(twin.unload(), before)
