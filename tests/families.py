"""Tiny random models of the families that people train, and what `all-linear` is to find in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    BambaConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.models import VOCABULARY, make_tiny

_ATTENTION = "q_proj k_proj v_proj o_proj"
_MLP = "gate_proj up_proj down_proj"
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
_SIZES |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_IMAGE_TOKEN, _IMAGE_SIDE, _PATCH = 3, 8, 4


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: as its authors write it.
        config: makes the configuration of a model of two layers.
        targets: the last part of the name of each module that `all-linear` takes, each once.
        left: what is left alone beside the output head: parts of the names of modules and parameters.
        together: the modules that read one tensor and keep one copy of its columns, as far as the masks allow it.
        normed: whether norms keep what those columns can be made from, so that no copy is kept.
        exclude: for `exclude_modules`.
        images: whether a row begins with an image.
        uncalled: the target of a float base whose weight the model reads without calling it, which gets no values.
        quantized: whether transformers quantizes its linear layers.
    """

    name: str
    config: Callable[[], PretrainedConfig]
    targets: str
    left: str = ""
    together: tuple[str, ...] = ()
    normed: bool = True
    exclude: str | None = None
    images: bool = False
    uncalled: str | None = None
    quantized: bool = True

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return make_tiny(self.config(), dtype, images=self.images)

    def batch(self, rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
        """Token ids from 6 on, so that none has a meaning of its own, and an image where the family reads images."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(6, VOCABULARY, (rows, length), generator=generator)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        if self.images:
            tokens[:, : (_IMAGE_SIDE // _PATCH) ** 2] = _IMAGE_TOKEN
            batch["pixel_values"] = torch.randn(rows, 3, _IMAGE_SIDE, _IMAGE_SIDE, generator=generator)
        return batch


def _llava() -> LlavaConfig:
    vision = {"image_size": _IMAGE_SIDE, "patch_size": _PATCH, "projection_dim": 16, "num_attention_heads": 2}
    return LlavaConfig(
        text_config=LlamaConfig(**_SIZES),
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **vision),
        image_token_index=_IMAGE_TOKEN,
        image_seq_length=(_IMAGE_SIDE // _PATCH) ** 2,
        vision_feature_layer=-1,
    )


_QKV, _GATE_UP = _ATTENTION.rpartition(" ")[0], _MLP.rpartition(" ")[0]
_LLAMA = {"targets": f"{_ATTENTION} {_MLP}", "together": (_QKV, _GATE_UP)}
_NO_NORM = {"normed": False}

FAMILIES = [
    Family("Llama", lambda: LlamaConfig(**_SIZES), **_LLAMA),
    Family("Mistral", lambda: MistralConfig(**_SIZES), **_LLAMA),
    Family("Qwen2", lambda: Qwen2Config(**_SIZES), **_LLAMA),
    Family("Qwen3", lambda: Qwen3Config(**_SIZES, head_dim=16), **_LLAMA),
    Family(
        "Qwen2-MoE",
        lambda: Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=24, decoder_sparse_step=1),
        f"{_ATTENTION} {_MLP} shared_expert_gate", "mlp.experts mlp.gate.", (_QKV, _GATE_UP),
    ),
    Family(
        "Qwen3-MoE", lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16, decoder_sparse_step=1),
        _ATTENTION, "mlp.experts mlp.gate.", (_QKV,),
    ),
    Family(
        "Mixtral", lambda: MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2),
        _ATTENTION, "mlp.experts mlp.gate.", (_QKV,),
    ),
    Family(
        "gpt-oss",
        lambda: GptOssConfig(
            **_SIZES, head_dim=16, num_local_experts=3, num_experts_per_tok=2, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"], rope_parameters={"rope_type": "default"},
        ),
        _ATTENTION, "mlp.experts mlp.router", (_QKV,),
    ),
    Family(
        "DeepSeek-V3",
        lambda: DeepseekV3Config(
            **_SIZES | {"num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            n_shared_experts=1, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        ),
        f"q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj {_MLP}", "mlp.experts mlp.gate.",
        ("q_a_proj kv_a_proj_with_mqa", _GATE_UP),
    ),
    Family(
        "Gemma-2", lambda: Gemma2Config(**_SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16), **_LLAMA
    ),
    Family(
        "Gemma-3", lambda: Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
        **_LLAMA,
    ),
    Family("Phi-3", lambda: Phi3Config(**_SIZES, **_TOKENS), "qkv_proj o_proj gate_up_proj down_proj"),
    Family(
        "GPT-NeoX",
        lambda: GPTNeoXConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY,
            max_position_embeddings=64,
        ),
        "query_key_value dense dense_h_to_4h dense_4h_to_h", **_NO_NORM,
    ),
    Family(
        "GPT-2",
        lambda: GPT2Config(
            n_embd=32, n_inner=48, n_head=2, n_layer=2, vocab_size=VOCABULARY, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, **_TOKENS,
        ),
        "c_attn c_proj c_fc", **_NO_NORM,
    ),
    Family(
        "OPT",
        lambda: OPTConfig(
            hidden_size=32, ffn_dim=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY,
            max_position_embeddings=64, word_embed_proj_dim=24, dropout=0.0, **_TOKENS,
        ),
        "q_proj k_proj v_proj out_proj fc1 fc2 project_in project_out", together=(_QKV,), **_NO_NORM,
    ),
    Family(
        "Falcon",
        lambda: FalconConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY, ffn_hidden_size=48,
            **_TOKENS,
        ),
        "query_key_value dense dense_h_to_4h dense_4h_to_h", quantized=False, **_NO_NORM,
    ),
    Family(
        "Jamba",
        lambda: JambaConfig(
            **_SIZES, num_experts=3, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_d_conv=4, mamba_expand=2,
            mamba_dt_rank=4, use_mamba_kernels=False, **_TOKENS,
        ),
        f"{_ATTENTION} in_proj x_proj dt_proj out_proj router {_MLP}", "feed_forward.experts conv1d A_log",
        (_QKV, _GATE_UP), uncalled="dt_proj",
    ),
    Family(
        "Bamba", lambda: BambaConfig(**_SIZES, **_MAMBA_2, attn_layer_indices=[1], mamba_expand=2, **_TOKENS),
        f"{_ATTENTION} in_proj out_proj {_MLP}", "conv1d", (_QKV, _GATE_UP),
    ),
    Family(
        "Falcon-H1", lambda: FalconH1Config(**_SIZES, **_MAMBA_2, head_dim=16, mamba_d_ssm=64, **_TOKENS),
        f"{_ATTENTION} in_proj out_proj {_MLP}", "conv1d", (_QKV, _GATE_UP),
    ),
    Family(
        "Llava (vision)", _llava, f"{_ATTENTION} {_MLP}", "vision_tower multi_modal_projector", (_QKV, _GATE_UP),
        exclude=".*(vision_tower|multi_modal_projector).*", images=True,
    ),
]  # fmt: skip
