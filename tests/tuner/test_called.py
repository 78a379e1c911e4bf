"""A targeted weight that a loss multiplies by itself, past its layer: an error, where a gradient would be wrong."""

from __future__ import annotations

import types

import pytest
import torch
from peft import get_peft_model
from torch import nn

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from tests.models import VOCABULARY, tiny_llama, token_batch, with_adapter

BATCH = token_batch()
MESSAGE = r"`target_modules` takes {}, and the model or its loss multiplies by that weight itself, .* Liger's .*: leave"


def fused(tied: bool, reads: str = "lm_head") -> nn.Module:
    """A model whose loss takes the head's weight, as the fused ones of Liger and CutCrossEntropy do."""
    model = tiny_llama(tie_word_embeddings=tied)

    def forward(self, input_ids=None, labels=None, **_):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        head = self.lm_head if reads == "lm_head" else self.model.embed_tokens
        if labels is None or not self.training:
            # asked for its dtype alone
            return types.SimpleNamespace(loss=None, logits=self.lm_head(hidden.to(self.lm_head.weight.dtype)))
        logits = nn.functional.linear(hidden, head.weight)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
        return types.SimpleNamespace(loss=loss, logits=logits)

    model.forward = types.MethodType(forward, model)
    return model


CASES = {
    "tied, by its embedding": (True, ["embed_tokens", "q_proj"], "lm_head", "lm_head"),
    "tied, by its head": (True, ["lm_head"], "lm_head", "lm_head"),
    "the embedding itself": (True, ["embed_tokens"], "embed_tokens", "model.embed_tokens"),
}


@pytest.mark.parametrize("case", [*CASES, "untied"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_training_is_refused(case, checkpointing):
    tied, targets, reads, named = CASES.get(case, (False, ["lm_head", "q_proj"], "lm_head", "lm_head"))
    model = with_adapter(fused(tied, reads), target_modules=targets).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    with pytest.raises(SpftError, match=MESSAGE.format(named)):
        model(**BATCH).loss.backward()


@pytest.mark.parametrize("case", CASES)
def test_the_salience_pass_is_refused(case):
    tied, targets, reads, named = CASES[case]
    model = get_peft_model(fused(tied, reads), SpftConfig(density=0.05, target_modules=targets, samples=2))
    model.train()
    with pytest.raises(SpftError, match=MESSAGE.format(named)):
        select_mask(model, [BATCH])


def test_the_salience_pass_leaves_an_untied_head_out_with_a_note():
    model = get_peft_model(fused(False), SpftConfig(density=0.05, target_modules=["lm_head", "q_proj"], samples=2))
    model.train()
    with pytest.warns(UserWarning, match="no gradient reached lm_head .* a head under a fused loss"):
        select_mask(model, [BATCH])
    model(**BATCH).loss.backward()


def test_what_is_not_trained_there_may_be_read():
    model = with_adapter(fused(True), target_modules=["q_proj"]).train()
    model(**BATCH).loss.backward()
    model = with_adapter(fused(True), target_modules=["embed_tokens", "q_proj"])
    with torch.no_grad():
        before = model.eval()(**BATCH).logits
        model.train()(**BATCH)
        assert torch.equal(model.eval()(**BATCH).logits, before)
    model.train()(input_ids=BATCH["input_ids"]).logits.sum().backward()
    for on in (model.merge_adapter, model.base_model.disable_adapter_layers):
        on()
        weight = model.base_model.model.lm_head.weight
        assert weight is model.base_model.model.model.embed_tokens.get_base_layer().weight
        model.unmerge_adapter()


def test_outside_of_a_pass_it_is_the_parameter_itself():
    inner = with_adapter(tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens"]).train().base_model.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight is inner.lm_head.get_base_layer().weight
