from __future__ import annotations

import json

import pytest

from axolotl_spft.bench.options import Options
from axolotl_spft.tools.bench import METHODS

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 72,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture
def tiny_options(tiny_shape):
    def make(**changes) -> Options:
        options = {"methods": METHODS, "model": tiny_shape, "tokens": 24, "rank": 2, "dtype": "fp32", "rounds": 2}
        return Options(**(options | {"samples": 2, "threads": 1} | changes))

    return make
