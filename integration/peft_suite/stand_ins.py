"""Small random models in a folder of the Hugging Face hub's layout, in the places of those that PEFT's tests load.

They have the names, the architectures and about the sizes; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000, **_TOKENS}
_DECODER = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
_ENCODER = {**_SIZES, "hidden_size": 32, "intermediate_size": 37, "max_position_embeddings": 512}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, **_TOKENS}
_OPT = {"num_attention_heads": 4, "vocab_size": 1000, **_TOKENS}


def _opt(width: int, layers: int) -> OPTConfig:
    return OPTConfig(hidden_size=width, ffn_dim=4 * width, word_embed_proj_dim=width, num_hidden_layers=layers, **_OPT)


def _qwen2() -> Qwen2Config:
    return Qwen2Config(**_DECODER)


def _llama() -> LlamaConfig:
    return LlamaConfig(**_DECODER)


_CAUSAL = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: _opt(16, 2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: GPT2Config(**_GPT),
    "hf-internal-testing/tiny-random-gpt2": lambda: GPT2Config(**_GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: GPTJConfig(**_GPT, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: MistralConfig(**_DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": _qwen2,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: Gemma3TextConfig(**_DECODER, head_dim=8),
    # with the twelve layers that the tests of quantized models count
    "peft-internal-testing/opt-125m": lambda: _opt(64, 12),
}
_SEQ2SEQ = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=1000, decoder_start_token_id=0
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=4, decoder_ffn_dim=4, vocab_size=1000, max_position_embeddings=512,
    ),
}  # fmt: skip
_FEATURES = {
    "peft-internal-testing/tiny-random-BertModel": lambda: BertConfig(**_ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: RobertaConfig(**_ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: DebertaConfig(
        **_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: DebertaV2Config(
        **_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
}
_CLASSIFICATION = {
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: BertConfig(**_ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: RobertaConfig(**_ENCODER),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _llama,
}
MODELS: tuple[tuple[type, dict[str, Callable[[], PretrainedConfig]]], ...] = (
    (AutoModelForCausalLM, _CAUSAL),
    (AutoModelForSeq2SeqLM, _SEQ2SEQ),
    (AutoModel, _FEATURES),
    (AutoModelForSequenceClassification, _CLASSIFICATION),
)


def write_models(hub: Path) -> None:
    """Write the models into ``hub``, a folder for ``HF_HUB_CACHE``, but those that are there already."""
    for kind, configs in MODELS:
        for name, config in configs.items():
            place = hub / f"models--{name.replace('/', '--')}"
            if (place / "refs" / "main").is_file():
                continue
            torch.manual_seed(0)
            model: PreTrainedModel = kind.from_config(config())
            model.save_pretrained(place / "snapshots" / "stand-in")
            (place / "refs").mkdir(exist_ok=True)
            # last, so that a model that is named is whole
            (place / "refs" / "main").write_text("stand-in", encoding="utf-8")
