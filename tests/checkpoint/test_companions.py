"""What stands beside the weights of a merged model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, VoxtralConfig, VoxtralForConditionalGeneration

from axolotl_spft.checkpoint.companions import CONFIG, copy_companions, merged_config
from tests.models import VOCABULARY, tiny_llama


def folder_of(path, **files: str):
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_weights_configs_and_hidden_files_are_not_copied(tmp_path):
    base = folder_of(
        tmp_path / "base", config__json="{}", generation_config__json="g", tokenizer__json="t", vocab__txt="v",
        modeling_own__py="code", LICENSE="l", model__safetensors="w", pytorch_model__bin="w",
    )  # fmt: skip
    for name in ("model.safetensors.index.json", ".gitattributes", "model.gguf"):
        (base / name).write_text("w")
    (base / "onnx").mkdir()
    adapter, target = folder_of(tmp_path / "adapter", tokenizer__json="no config beside it"), tmp_path / "target"
    target.mkdir()
    names = copy_companions(base, adapter, target)
    assert sorted(names) == ["LICENSE", "generation_config.json", "modeling_own.py", "tokenizer.json", "vocab.txt"]
    assert sorted(names) == sorted(path.name for path in target.iterdir())
    assert (target / "tokenizer.json").read_text() == "t"


def test_a_tokenizer_of_the_adapter_takes_the_place_of_all_of_the_bases(tmp_path):
    base = folder_of(tmp_path / "base", tokenizer__json="old", vocab__txt="old", generation_config__json="g")
    adapter = folder_of(tmp_path / "adapter", tokenizer_config__json="{}", tokenizer__json="new", README__md="card")
    target = tmp_path / "target"
    target.mkdir()
    assert set(copy_companions(base, adapter, target)) == {
        "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert (target / "tokenizer.json").read_text() == "new"


@pytest.mark.parametrize("saved", ["tokenizer", "template", "processor"])
def test_a_processor_stays_where_only_a_tokenizer_was_saved(tmp_path, saved):
    names = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    base = folder_of(tmp_path / "base", tokenizer_config__json="old", tokenizer__json="old", chat_template__json="old")
    for name in names:
        (base / name).write_text("old")
    adapter = folder_of(tmp_path / "adapter", tokenizer_config__json="new", tokenizer__json="new")
    if saved != "tokenizer":
        (adapter / "chat_template.jinja").write_text("new")
    if saved == "processor":
        (adapter / "processor_config.json").write_text("new")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(base, adapter, target)
    found = {path.name: path.read_text() for path in target.iterdir()}
    expected = dict.fromkeys(names, "old") | dict.fromkeys(("tokenizer_config.json", "tokenizer.json"), "new")
    # where it finds both, a processor takes the first
    expected |= {"chat_template.json": "old"} if saved == "tokenizer" else {"chat_template.jinja": "new"}
    assert found == expected | ({"processor_config.json": "new"} if saved == "processor" else {})


def tiny_voxtral():
    """It hears: the config of its encoder has a vocabulary too, which is not that of its embedding."""
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=VOCABULARY, tie_word_embeddings=True)
    hears = {**sizes, "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 16}
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(VoxtralConfig(audio_config=hears, text_config=text.to_dict()))


@pytest.mark.parametrize("make", [lambda: tiny_llama(tie_word_embeddings=True), tiny_voxtral])
def test_a_config_says_what_the_adapter_changed_and_nothing_else(tmp_path, make):
    model = make()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert merged_config(tmp_path, model, {}, untied=False, heads=(), tokenizer=tmp_path) == config
    names = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    grown = merged_config(tmp_path, model, {f"{names[0]}.weight": (72, 36)}, True, (), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()) == config
    text = config.get("text_config", config)
    text |= {"vocab_size": 72, "tie_word_embeddings": False}
    assert grown == config | {"tie_word_embeddings": False}
    if "text_config" in config:
        # a file may leave out what is the default of its part
        del text["vocab_size"]
        (tmp_path / CONFIG).write_text(json.dumps(config))
        grown = merged_config(tmp_path, model, {f"{names[0]}.weight": (72, 36)}, False, (), tmp_path)
        assert grown["text_config"]["vocab_size"] == 72 and grown["audio_config"]["vocab_size"] == VOCABULARY


def test_a_new_head_gives_the_config_its_class_and_labels(tmp_path):
    base = folder_of(tmp_path / "base", config__json='{"architectures": ["LlamaForCausalLM"]}')
    model = LlamaForSequenceClassification(tiny_llama(num_labels=3).config)
    config = merged_config(base, model, {"score.weight": (3, 36)}, False, {"score.weight"}, tmp_path)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"]["LABEL_2"] == 2
