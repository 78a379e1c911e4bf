"""A targeted weight that a loss multiplies by itself, past its layer: an error, where a gradient would be wrong."""

from __future__ import annotations

import types

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers.modeling_outputs import CausalLMOutput

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
        if labels is None or not torch.is_grad_enabled():
            # asked for its dtype alone
            return CausalLMOutput(logits=self.lm_head(hidden.to(self.lm_head.weight.dtype)))
        logits = nn.functional.linear(hidden, head.weight)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
        return CausalLMOutput(loss=loss, logits=logits)

    model.forward = types.MethodType(forward, model)
    return model


CASES = {
    "tied, by its embedding": (True, ["embed_tokens", "q_proj"], "lm_head", "lm_head"),
    "tied, by its head": (True, ["lm_head"], "lm_head", "lm_head"),
    "the embedding itself": (True, ["embed_tokens"], "embed_tokens", "lm_head and model.embed_tokens"),
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
def test_training_in_eval_mode_is_refused(case):
    tied, targets, reads, named = CASES[case]
    model = with_adapter(fused(tied, reads), target_modules=targets).eval()
    with torch.no_grad():
        model(**BATCH)
    loss = model(**BATCH).loss
    with pytest.raises(SpftError, match=MESSAGE.format(named)):
        loss.backward()


class Small(nn.Module):
    """An embedding and a head, for torch.compile, which takes its time with a larger model."""

    def __init__(self, tied: bool, fused: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(13, 5), nn.Linear(5, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.fused = fused

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids).sin().to(self.head.weight.dtype)
        return (nn.functional.linear(hidden, self.head.weight) if self.fused else self.head(hidden)).sin().sum()


@pytest.mark.parametrize(("tied", "training"), [(True, True), (True, False), (False, True)])
def test_a_compiled_model_is_refused(tied, training):
    torch._dynamo.reset()
    model = with_adapter(Small(tied, fused=True), target_modules=["head"]).train(training)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.arange(13))
    with pytest.raises(SpftError, match=MESSAGE.format("embed and head" if tied else "head")):
        loss.backward()


def test_a_compiled_model_may_ask_for_the_dtype():
    torch._dynamo.reset()
    model, graphs, ids = with_adapter(Small(tied=True, fused=False), target_modules=["head"]), [], torch.arange(13)
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got, expected = (torch.autograd.grad(run(ids), values) for run in (compiled, model))
    torch.testing.assert_close(got, expected)
    assert not any("asked" in str(node.target) for graph in graphs for node in graph.graph.nodes)


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


def test_a_loss_outside_of_the_pass_that_calls_the_module_piece_by_piece():
    model = with_adapter(tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"]).train()
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner, labels = model.get_base_model(), BATCH["labels"]
    for _ in range(2):
        hidden = inner.model(input_ids=BATCH["input_ids"]).last_hidden_state
        pieces = torch.cat([inner.get_output_embeddings()(piece) for piece in hidden.split(1)])
        loss = inner.loss_function(logits=pieces, labels=labels, vocab_size=VOCABULARY)
        expected = torch.autograd.grad(model(**BATCH).loss, values)
        torch.testing.assert_close(torch.autograd.grad(loss, values), expected)
