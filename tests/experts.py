"""Tiny models with experts whose weights are parameters of three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.interpreter import DEVICE
from tests.models import VOCABULARY

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# no token comes to the first one
N_EXPERTS, IDLE = 5, 0
_COMMON = {"hidden_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
           "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_experts_per_tok": 2}  # fmt: skip


def make(config: PretrainedConfig, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose first expert gets no token, with weights that are larger than the usual ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        for module in model.modules():
            _keep_tokens_away(module)
    return model.to(DEVICE, dtype)


def _keep_tokens_away(router: nn.Module) -> None:
    if "Router" not in type(router).__name__:
        return
    if getattr(router, "e_score_correction_bias", None) is not None:
        router.e_score_correction_bias[IDLE] = -1e4
    elif getattr(router, "bias", None) is not None:
        router.bias[IDLE] = -1e4
    else:
        # of two pairs with opposite rows one is always above 0
        row = router.weight[1].clone()
        router.weight.copy_(torch.stack([0 * row, row, 1.01 * row, -row, -1.01 * row]))


def tiny_mixtral(implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    options = _COMMON | {"num_local_experts": N_EXPERTS, "intermediate_size": 22}
    return make(MixtralConfig(**(options | changes)), implementation, dtype)


def tiny_qwen2_moe(implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """With a shared expert of linear layers."""
    options = _COMMON | {"num_experts": N_EXPERTS, "moe_intermediate_size": 18, "intermediate_size": 44}
    options |= {"shared_expert_intermediate_size": 22, "decoder_sparse_step": 1}
    return make(Qwen2MoeConfig(**(options | changes)), implementation, dtype)


def tiny_qwen3_moe(implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    options = _COMMON | {"num_experts": N_EXPERTS, "moe_intermediate_size": 18, "intermediate_size": 44, "head_dim": 14}
    return make(Qwen3MoeConfig(**(options | changes)), implementation, dtype)


def tiny_gpt_oss(implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """Stores each expert's weight as (in_features, out_features), and has biases."""
    options = _COMMON | {"num_local_experts": N_EXPERTS, "intermediate_size": 22, "head_dim": 14}
    return make(GptOssConfig(**(options | changes)), implementation, dtype)


def tiny_deepseek(implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """Routed and shared experts, after a first layer without any."""
    options = _COMMON | {"n_routed_experts": N_EXPERTS, "moe_intermediate_size": 18, "intermediate_size": 44}
    options |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 10,
                "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 9}  # fmt: skip
    options |= {"num_key_value_heads": 2}
    return make(DeepseekV3Config(**(options | changes)), implementation, dtype)


EXPERT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": tiny_mixtral,
    "qwen2_moe": tiny_qwen2_moe,
    "qwen3_moe": tiny_qwen3_moe,
    "gpt_oss": tiny_gpt_oss,
    "deepseek_v3": tiny_deepseek,
}


def four_bit_experts(model: nn.Module) -> nn.Module:
    """The model, whose experts' weights bitsandbytes holds in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    for experts in [module for module in model.modules() if type(module).__name__.endswith("Experts")]:
        for parameter in PARAMETERS:
            bnb.replace_parameter_4bit(experts, parameter.removeprefix("experts."), quant_type="nf4")
    return model
