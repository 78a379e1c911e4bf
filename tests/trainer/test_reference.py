"""The adapter that TRL's trainers compare the trained one with, and a user's own of the same name."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer

from axolotl_spft import SpftCallback, SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from tests.models import tiny_llama, with_adapter
from tests.trainer.test_callback import arguments, plain, sentence, tokenizer


def dpo_of(model, folder, **changes) -> DPOTrainer:
    pairs = [{"prompt": sentence(i), "chosen": sentence(i + 1), "rejected": sentence(i + 9)} for i in range(4)]
    return DPOTrainer(
        model,
        args=arguments(DPOConfig, folder, max_length=32, max_steps=1, save_strategy="no", **changes),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        callbacks=[SpftCallback()],
    )


def held(model, adapter_name: str) -> list[torch.Tensor]:
    layers = [layer for layer in adapted_layers(model).values() if adapter_name in layer.spft_columns]
    return [
        each.detach().clone() for layer in layers for each in (*layer.mask(adapter_name), layer.values(adapter_name))
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a.double(), b.double()) for a, b in zip(one, other))


def adapted():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience="magnitude"))
    select_mask(model, None)
    return model


def add_own(model) -> None:
    model.add_adapter("ref", SpftConfig(density=0.02, salience="random", target_modules=["q_proj", "up_proj"]))
    select_mask(model, None, adapter_name="ref")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            if layer.has_values("ref"):
                layer.values("ref").fill_(0.5)


def test_a_trainer_that_compares_with_nothing_leaves_an_adapter_of_that_name_alone(tmp_path):
    model = adapted()
    add_own(model)
    before = held(model, "ref")
    plain(tmp_path, model).train()
    assert before and same(held(model, "ref"), before)


def test_one_that_compares_renews_its_own_copy_with_each_trainer(tmp_path):
    model = adapted()
    for _ in range(2):
        trainer, start = dpo_of(model, tmp_path), held(model, "default")
        trainer.train()
        assert same(held(model, "ref"), start) and not same(held(model, "default"), start)


def test_one_that_compares_refuses_a_users_own(tmp_path):
    model = adapted()
    add_own(model)
    trainer, before = dpo_of(model, tmp_path), held(model, "ref")
    with pytest.raises(SpftError, match=r"an adapter `ref` of its own, and a DPOTrainer .* under another name"):
        trainer.train()
    assert same(held(model, "ref"), before)
    model.delete_adapter("ref")
    dpo_of(model, tmp_path).train()


def test_random_values_that_the_config_asks_for_are_none_of_the_users(tmp_path):
    model = with_adapter(tiny_llama())
    trainer, start = dpo_of(model, tmp_path), held(model, "default")
    trainer.train()
    assert same(held(model, "ref"), start)


@pytest.mark.parametrize("salience", ["gradient", "random"])
def test_checkpointed_blocks_with_whole_modules_compute_the_same_twice(tmp_path, salience):
    """The loss takes the adapter away and back between the pass of the policy and that of its gradients."""
    config = SpftConfig(density=0.05, samples=4, salience=salience, modules_to_save=["norm"])
    model = get_peft_model(tiny_llama(), config)
    trainer = dpo_of(model, tmp_path, gradient_checkpointing=True)
    whole = [parameter for name, parameter in model.named_parameters() if ".modules_to_save.default." in name]
    before = [parameter.detach().clone() for parameter in whole]
    trainer.train()
    assert all(parameter.requires_grad for parameter in whole) and whole
    assert not any(torch.equal(parameter, old) for parameter, old in zip(whole, before))
