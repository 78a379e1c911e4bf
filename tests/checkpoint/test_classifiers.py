"""Merges of classifiers and reward models into the language model that they began as."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from axolotl_spft import SpftConfig
from axolotl_spft.checkpoint.merge import merge
from tests.checkpoint.saved import save_base
from tests.models import VOCABULARY, logits, tiny_llama

_CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


def tiny_roberta(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The head of its classifier has a matrix of the hidden size beside that of the labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return RobertaForMaskedLM(RobertaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=64)).to(dtype)


def _trained(base, folder, task="SEQ_CLS", labels=3, rows=None, pad=0, **options):
    model = _CLASSES[task].from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model.config.pad_token_id = pad
    torch.manual_seed(1)
    adapted = get_peft_model(model, SpftConfig(task_type=task, init_weights=False, density=0.1, **options)).eval()
    adapted.save_pretrained(folder)
    return adapted


def _save_tokenizer(folder, pad="<pad>"):
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<pad>": 2, "</s>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize(
    "make, task, labels, rows",
    [
        (tiny_roberta, "SEQ_CLS", 3, None),
        (tiny_roberta, "SEQ_CLS", 2, None),
        (tiny_roberta, "TOKEN_CLS", 5, None),
        (tiny_llama, "SEQ_CLS", 1, None),
        (tiny_llama, "SEQ_CLS", 3, 72),
    ],
)
def test_a_merged_classifier_has_the_labels_that_were_trained(tmp_path, make, task, labels, rows):
    base = save_base(tmp_path / "base", make, torch.float32)
    # PEFT names the heads of classifiers of sentences by itself
    whole = ["embed_tokens"] if rows else ["classifier"] if task == "TOKEN_CLS" else None
    trained = _trained(base, tmp_path / "run", task, labels, rows, modules_to_save=whole)
    merge(tmp_path / "run", tmp_path / "merged", base)
    merged = _CLASSES[task].from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == labels
    merged.config.pad_token_id = 0
    assert torch.equal(logits(merged), logits(trained.merge_and_unload()))


def test_a_head_of_other_labels_than_the_base_has(tmp_path):
    base = save_base(tmp_path / "base", tiny_roberta, torch.float32)
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    AutoModelForSequenceClassification.from_pretrained(base, **labels).save_pretrained(tmp_path / "classifier")
    for count, names in ((2, ["no", "yes"]), (4, [f"LABEL_{each}" for each in range(4)])):
        trained = _trained(tmp_path / "classifier", tmp_path / "run", labels=count)
        merge(tmp_path / "run", tmp_path / f"merged{count}", tmp_path / "classifier")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"merged{count}").eval()
        assert list(merged.config.id2label.values()) == names
        merged.config.pad_token_id = 0
        assert torch.equal(logits(merged), logits(trained.merge_and_unload()))


@pytest.mark.parametrize("pad, expected", [("<pad>", 2), ("</s>", 3), (None, None)])
def test_a_reward_model_pads_with_the_token_of_the_tokenizer_beside_it(tmp_path, pad, expected):
    base = save_base(tmp_path / "base", tiny_llama, torch.float32)
    trained = _trained(base, tmp_path / "run", labels=1, pad=expected)
    _save_tokenizer(tmp_path / "run", pad)
    merge(tmp_path / "run", tmp_path / "merged", base)
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("pad_token_id") == expected
    if expected is not None:
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(logits(merged), logits(trained.merge_and_unload()))


def test_the_padding_that_a_base_has_stays(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama, torch.float32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    _trained(base, tmp_path / "run", labels=1, pad=5)
    _save_tokenizer(tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "merged", base)
    assert json.loads((tmp_path / "merged/config.json").read_text())["pad_token_id"] == 5
