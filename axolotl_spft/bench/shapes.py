"""The shapes of model that are measured: named ones, and any Hugging Face configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_spft.errors import SpftError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# `llama-45m` trains in a blink on a CPU; the others have the shapes of Llama 3.1 8B and 70B
SHAPES = {
    "llama-45m": {
        "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 3072, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "llama-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
DEFAULT_SHAPE = "llama-45m"


def model_config(model: str, tokens: int, width: int | None = None) -> PretrainedConfig:
    """The configuration of a named shape, or of a ``config.json`` (the file or its folder).

    Args:
        tokens: the longest row that the model must take.
        width: another hidden_size; the intermediate size and the number of heads follow in proportion.

    Raises:
        SpftError: no such shape or file, no causal language model's, or a width that the head size does not divide.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    if model in SHAPES:
        config = LlamaConfig(**SHAPES[model], max_position_embeddings=8192)
    elif Path(model).exists():
        # of a model that sees, the part that reads
        config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise SpftError(f"`--model {model}` holds a {type(config).__name__}, and no causal language model has that")
    else:
        raise SpftError(f"`--model {model}` is neither a file nor one of {', '.join(SHAPES)}: name one of them")
    if width is not None:
        _scale(config, width)
    if getattr(config, "max_position_embeddings", tokens) < tokens:
        config.max_position_embeddings = tokens
    config.use_cache = False
    return config


def _scale(config: PretrainedConfig, width: int) -> None:
    before, heads = config.hidden_size, config.num_attention_heads
    head_size = before // heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    if width % (head_size * groups):
        raise SpftError(f"`width {width}` must be a multiple of {head_size * groups}, the size of a group of heads")
    config.intermediate_size = round(config.intermediate_size * width / before / 8) * 8
    config.hidden_size = width
    config.num_attention_heads = width // head_size
    config.num_key_value_heads = width // head_size // groups
