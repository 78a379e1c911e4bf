"""Tiny random models of several architectures, with sizes that are no multiples of 8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from axolotl_spft import SpftConfig
from tests.interpreter import DEVICE

VOCABULARY = 67


def make_tiny(config: PretrainedConfig, dtype: torch.dtype, images: bool = False) -> nn.Module:
    """The model of a configuration, one that reads images too or one of text, with random weights."""
    torch.manual_seed(0)
    model = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager",
        # the grouped products want sizes that are multiples of 16 bytes
        experts_implementation="eager",
    )
    # larger than the usual initialization, so that gradients differ clearly from one entry to the next
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.to(DEVICE, dtype)


def tiny_llama(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    options = {"hidden_size": 36, "intermediate_size": 50, "num_key_value_heads": 1, "num_attention_heads": 2}
    options |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return make_tiny(LlamaConfig(**(options | changes)), dtype)


def tiny_qwen2(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """With biases in q, k and v."""
    options = {"hidden_size": 28, "intermediate_size": 46, "num_key_value_heads": 1, "num_attention_heads": 2}
    options |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    model = make_tiny(Qwen2Config(**(options | changes)), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(std=0.1)
    return model


def tiny_gpt2(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """With `Conv1D` layers, which store their weight transposed."""
    options = {"n_embd": 26, "n_inner": 42, "n_head": 2, "n_layer": 2, "vocab_size": VOCABULARY, "n_positions": 64}
    options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return make_tiny(GPT2Config(**(options | changes)), dtype)


def tiny_moe(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A mixture of experts: the attention and the shared expert are linear layers."""
    options = {"hidden_size": 28, "intermediate_size": 44, "num_key_value_heads": 1, "num_attention_heads": 2}
    options |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    options |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 18}
    options |= {"shared_expert_intermediate_size": 22, "decoder_sparse_step": 1}
    return make_tiny(Qwen2MoeConfig(**(options | changes)), dtype)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "moe": tiny_moe,
}


def token_batch(rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(
        0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed), device="cpu"
    ).to(DEVICE)
    return {"input_ids": tokens, "labels": tokens}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the model holds exactly these weights, bit for bit."""
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def with_adapter(model: nn.Module, seed: int = 0, adapter_name: str = "default", **options) -> nn.Module:
    """The model with a random sparse adapter."""
    torch.manual_seed(seed)
    return get_peft_model(model, SpftConfig(init_weights=False, **({"density": 0.1} | options)), adapter_name)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_batch()["input_ids"]).logits
