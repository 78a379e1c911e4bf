"""The salience pass on a real `transformers.Trainer`."""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from axolotl_spft import SpftCallback, SpftConfig, select_mask
from axolotl_spft.errors import SpftMemoryError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.salience_pass import has_mask, peft_model_of, select_mask_with_trainer
from tests.models import VOCABULARY, tiny_llama


def rows(count: int = 24) -> list[dict]:
    tokens = torch.randint(0, VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(folder, dropout: float = 0.0, rows_per_batch: int = 2, **changes) -> Trainer:
    model = get_peft_model(tiny_llama(attention_dropout=dropout), SpftConfig(density=0.05, samples=12))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows_per_batch, gradient_accumulation_steps=3, max_steps=4,
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


class Stream(torch.utils.data.IterableDataset):
    """Of rows that are there once, as those of a socket are."""

    def __init__(self, kept: list[dict]):
        self.rows = iter(kept)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        return next(self.rows)


def test_a_training_set_that_is_its_own_iterator_is_noted(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = Stream(rows())
    with pytest.warns(UserWarning, match="the training set, a Stream, is its own iterator.*`mask_path`"):
        select_mask_with_trainer(trainer, peft_model_of(trainer))
    trainer = make_trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        select_mask_with_trainer(trainer, peft_model_of(trainer))


class Memory:
    """A device that holds so many rows: a forward pass of more runs out of memory, in words that are known."""

    def __init__(self, model, rows: int, words: str):
        self.rows, self.words, self.seen = rows, words, []
        model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        rows = len(kwargs["input_ids"])
        self.seen.append(rows)
        if rows > self.rows:
            raise (torch.OutOfMemoryError if "CUDA" in self.words else RuntimeError)(self.words)


WORDS = ["CUDA out of memory. Tried to allocate 2 GiB.", "DefaultCPUAllocator: can't allocate memory: 8 bytes"]


@pytest.mark.parametrize("words", WORDS)
def test_auto_find_batch_size_halves_the_rows_of_the_pass_too(tmp_path, words):
    trainer = make_trainer(tmp_path, rows_per_batch=4, auto_find_batch_size=True)
    model = peft_model_of(trainer)
    memory = Memory(model.base_model.model, 2, words)
    with pytest.warns(UserWarning, match="starts anew with 2 rows in a batch"):
        select_mask_with_trainer(trainer, model)
    assert memory.seen == [4] + [2] * 6
    assert (trainer._train_batch_size, trainer.args.per_device_train_batch_size) == (4, 4)
    two = make_trainer(tmp_path, rows_per_batch=2)
    select_mask_with_trainer(two, peft_model_of(two))
    assert equal(masks_of(model), masks_of(peft_model_of(two)))
    # the run itself finds its own rows
    trainer.train()
    assert trainer.state.global_step == 4 and memory.seen[-1] <= 2


def test_the_accumulators_are_gone_before_the_pass_starts_anew(tmp_path, monkeypatch):
    from axolotl_spft.salience import sample_pass
    from axolotl_spft.trainer import salience_pass as trainer_pass

    made, alive = [], []
    gathered = sample_pass.gathered_sums

    @contextmanager
    def watched(*args, **kwargs):
        with gathered(*args, **kwargs) as sums:
            made.extend(weakref.ref(total) for of_layers in sums.values() for total in of_layers.values())
            yield sums

    monkeypatch.setattr(sample_pass, "gathered_sums", watched)
    give_back = trainer_pass.give_back_memory
    monkeypatch.setattr(
        trainer_pass, "give_back_memory", lambda: alive.append((give_back(), sum(each() is not None for each in made)))
    )
    trainer = make_trainer(tmp_path, rows_per_batch=4, auto_find_batch_size=True)
    Memory(peft_model_of(trainer).base_model.model, 1, WORDS[0])
    with pytest.warns(UserWarning, match="starts anew with 1 rows"):
        select_mask_with_trainer(trainer, peft_model_of(trainer))
    assert made and [count for _, count in alive] == [0, 0]


@pytest.mark.parametrize("changes", [{}, {"auto_find_batch_size": True}], ids=str)
def test_out_of_memory_names_what_to_change(tmp_path, changes):
    trainer = make_trainer(tmp_path, rows_per_batch=4, **changes)
    model = peft_model_of(trainer)
    memory = Memory(model.base_model.model, 0, WORDS[0])
    with pytest.raises(SpftMemoryError, match=r"lower `micro_batch_size`.*`salience_memory_gib`.*`gradient_checkpoint"):
        select_mask_with_trainer(trainer, model)
    assert memory.seen == ([4, 2, 1] if changes else [4])
    assert not has_mask(model)
    memory.rows = 4
    select_mask_with_trainer(trainer, model)


def test_an_interrupted_pass_after_a_warm_up_is_made_again(tmp_path):
    class Interrupted(Trainer):
        calls = count(1)

        def compute_loss(self, *args, **kwargs):
            if next(self.calls) == 5:  # 3 batches are the warm-up's step
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    plain = make_trainer(tmp_path)
    config = SpftConfig(density=0.05, samples=12, score_after=1, modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    trainer = Interrupted(model, plain.args, train_dataset=rows(), callbacks=[SpftCallback()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not has_mask(model)
    trainer.train()
    layers = adapted_layers(model).values()
    assert all(layer.mask("default").nnz == layer.values("default").numel() for layer in layers)
    assert any(layer.values("default").any() for layer in layers)
