"""Collators with generators and counts of their own."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from axolotl_spft import SpftCallback
from axolotl_spft.trainer.salience_pass import peft_model_of, select_mask_with_trainer
from axolotl_spft.trainer.untouched_collator import untouched_collator
from tests.trainer.test_callback import plain, tokenizer


class Collator:
    def __init__(self, inner=None):
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.old, self.python, self.calls, self.inner = np.random.RandomState(1), random.Random(1), 0, inner

    def __call__(self, features: list) -> list:
        self.calls += 1
        drawn = [self.numpy.random(), self.old.rand(), self.python.random()]
        drawn.append(torch.rand((), generator=self.torch).item())
        return [self.calls, *drawn, *([] if self.inner is None else self.inner(features))]

    def collate(self, features: list) -> list:
        return self(features)


@pytest.mark.parametrize("kind", ["plain", "in another", "a part", "a method"])
def test_what_it_draws_afterwards_is_what_it_would_have_drawn(kind):
    def make():
        collator = Collator(Collator() if kind == "in another" else None)
        return {"a part": partial(Collator.__call__, collator), "a method": collator.collate}.get(kind, collator)

    expected, collator = make()([]), make()
    with untouched_collator(collator):
        assert collator([]) == expected != collator([])
        if kind != "a part":
            getattr(collator, "__self__", collator).made_on_the_way = 1
    found = collator([])
    assert found[1:] == expected[1:] and (kind == "a method" or found == expected)
    assert kind == "a method" or not hasattr(collator, "made_on_the_way")


def test_masked_tokens_of_a_seeded_collator_are_those_of_a_run_without_the_pass(tmp_path):
    def batches(with_pass: bool) -> list[torch.Tensor]:
        words = tokenizer()
        words.mask_token = "<unk>"
        collator = DataCollatorForLanguageModeling(words, mlm_probability=0.5, mlm=True, seed=3)
        trainer = plain(tmp_path, callbacks=[SpftCallback()], data_collator=collator)
        if with_pass:
            select_mask_with_trainer(trainer, peft_model_of(trainer))
        torch.manual_seed(0)
        return [batch["labels"] for batch in trainer.get_train_dataloader()]

    for one, other in zip(batches(False), batches(True), strict=True):
        assert torch.equal(one, other)
