from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import Gemma3Config, T5Config

from axolotl_spft.bench.base import make_base, target_layers, target_modules, text_batch
from axolotl_spft.bench.shapes import SHAPES, model_config
from axolotl_spft.errors import SpftError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_made_in_its_dtype_and_frozen(tiny_shape, dtype):
    base = make_base(model_config(tiny_shape, 24), dtype, CPU)
    assert {parameter.dtype for parameter in base.parameters()} == {dtype}
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert target_modules(base) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    loss = base(**text_batch(97, 24, CPU)).loss
    assert torch.isfinite(loss) and loss.requires_grad


def test_every_method_gets_the_same_base(tiny_shape):
    first, second = (make_base(model_config(tiny_shape, 24), torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first.parameters(), second.parameters()))
    assert first.model.layers[0].mlp.up_proj.weight.std() == pytest.approx(0.02, rel=0.1)


def test_a_4bit_base_is_quantized_but_for_embeddings_and_head(tiny_shape):
    base = make_base(model_config(tiny_shape, 24), torch.float32, CPU, "4bit")
    layers = target_layers(base).values()
    assert len(layers) == 14
    assert all(isinstance(layer, bnb.nn.Linear4bit) and layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    assert type(base.lm_head) is nn.Linear
    plain = make_base(model_config(tiny_shape, 24), torch.float32, CPU)
    batch = text_batch(97, 24, CPU)
    torch.testing.assert_close(base(**batch).loss, plain(**batch).loss, rtol=0.02, atol=0)


def test_the_named_shapes_are_those_of_their_models():
    for name, parameters in {"llama-45m": 45e6, "llama-8b": 8.03e9, "llama-70b": 70.6e9}.items():
        shape = SHAPES[name]
        hidden, grouped = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
        layer = hidden**2 * (2 + 2 * grouped) + 3 * hidden * shape["intermediate_size"]
        embeddings = hidden * shape["vocab_size"] * (1 if shape["tie_word_embeddings"] else 2)
        assert shape["num_hidden_layers"] * layer + embeddings == pytest.approx(parameters, rel=0.02)


def test_a_width_scales_the_rest():
    config = model_config("llama-8b", 512, width=2048)
    assert (config.hidden_size, config.intermediate_size) == (2048, 7168)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 4, 128)
    with pytest.raises(SpftError, match="`width 1000` must be a multiple of 512"):
        model_config("llama-8b", 512, width=1000)


def test_of_a_model_that_sees_the_part_that_reads_is_measured(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    text |= {"vocab_size": 97, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    base = make_base(model_config(str(tmp_path), 24), torch.float32, CPU)
    assert base.config.vocab_size == 97 and base.config.hidden_size == 32


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(SpftError, match="holds a T5Config, and no causal language model"):
        model_config(str(tmp_path), 24)


def test_an_unknown_shape_is_named():
    with pytest.raises(SpftError, match=r"`--model llama-9b` is neither a file nor one of llama-45m"):
        model_config("llama-9b", 512)
