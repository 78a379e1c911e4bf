"""The salience pass on a real `transformers.Trainer`."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.salience_pass import has_mask, peft_model_of, select_mask_with_trainer
from tests.models import VOCABULARY, tiny_llama


def rows(count: int = 24) -> list[dict]:
    tokens = torch.randint(0, VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(folder, dropout: float = 0.0, **changes) -> Trainer:
    model = get_peft_model(tiny_llama(attention_dropout=dropout), SpftConfig(density=0.05, samples=12))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4,
        learning_rate=0.01, use_cpu=True, report_to=[], seed=3, logging_steps=1, save_strategy="no",
        disable_tqdm=True, **changes,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows())


def masks_of(model) -> list[torch.Tensor]:
    return [tensor.clone() for layer in adapted_layers(model).values() for tensor in layer.mask("default")]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.int(), b.int()) for a, b in zip(one, other, strict=True))


def test_the_mask_comes_from_the_trainers_own_first_batches(tmp_path):
    trainer = make_trainer(tmp_path)
    model = peft_model_of(trainer)
    assert not has_mask(model)
    report = select_mask_with_trainer(trainer, model)
    assert report.samples == 12
    assert has_mask(model)

    expected = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=12))
    batches = [batch for _, batch in zip(range(6), make_trainer(tmp_path).get_train_dataloader())]
    # a trainer weighs every token of an optimizer step alike: 3 batches of 2 rows with 9 counted tokens each
    select_mask(expected, batches, lambda model, batch: model(**batch, num_items_in_batch=54).loss)
    assert equal(masks_of(model), masks_of(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_afterwards_equals_training_with_the_mask_from_a_file(tmp_path, checkpointing):
    path = str(tmp_path / "mask.safetensors")
    results = []
    for _ in range(2):  # the second finds the file
        trainer = make_trainer(tmp_path, dropout=0.1, gradient_checkpointing=checkpointing)
        model = peft_model_of(trainer)
        model.peft_config["default"].mask_path = path
        state = copy.deepcopy(vars(trainer.state))
        torch.manual_seed(11)
        select_mask_with_trainer(trainer, model)
        assert vars(trainer.state) == state
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        values = [layer.spft_values["default"].detach().clone() for layer in adapted_layers(model).values()]
        results.append((losses, masks_of(model), values))
    (losses, masks, values), (other_losses, other_masks, other_values) = results
    assert len(losses) == 4
    assert losses == other_losses
    assert equal(masks, other_masks)
    assert all(torch.equal(one, other) for one, other in zip(values, other_values))
    assert any(one.any() for one in values)
