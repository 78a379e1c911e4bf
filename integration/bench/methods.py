"""The fine-tuning methods that the benchmarks compare, all on the same kind of base model."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_spft import SparseAdamW, SpftConfig, select_mask

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Method(NamedTuple):
    """A model that is ready to train, its optimizer (None where nothing trains) and figures worth showing."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    trained: int
    area: float | None = None


def make_base(hidden: int, intermediate: int, layers: int, vocabulary: int, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights, the same for every method."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False)
    # as every adapter run does: gradients flow down to the embeddings
    model.enable_input_require_grads()
    return model


def text_batch(vocabulary: int, tokens: int, index: int = 0) -> dict[str, torch.Tensor]:
    """``tokens`` bytes of the Python standard library's source, as one row."""
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    start = index * tokens % (len(source) - tokens)
    ids = torch.tensor(list(source[start : start + tokens]))[None] % vocabulary
    return {"input_ids": ids, "labels": ids}


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)


def limit(base: nn.Module, **_: Any) -> Method:
    """Forward and dX of the frozen model: what any adapter must pay."""
    return Method(base, None, 0)


def full(base: nn.Module, **_: Any) -> Method:
    """Every targeted weight trains."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in TARGETS)
    return Method(base, _adamw(base), _trained(base))


def lora(base: nn.Module, rank: int, **_: Any) -> Method:
    """PEFT's LoRA with factors in the base's dtype, its faster setting."""
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=TARGETS), autocast_adapter_dtype=False)
    return Method(model, _adamw(model), _trained(model))


def shira(base: nn.Module, rank: int, **_: Any) -> Method:
    """PEFT's SHiRA with its random mask."""
    model = get_peft_model(base, ShiraConfig(r=rank, target_modules=TARGETS), autocast_adapter_dtype=False)
    return Method(model, _adamw(model), _trained(model))


def spft(base: nn.Module, rank: int, tokens: int, salience: str, scope: str) -> Method:
    """This package, with as many values as LoRA of ``rank``."""
    config = SpftConfig(match_lora_rank=rank, target_modules=TARGETS, salience=salience, scope=scope, samples=8)
    model = get_peft_model(base, config)
    vocabulary = base.config.vocab_size
    report = select_mask(model, (text_batch(vocabulary, tokens, 100 + index) for index in range(8)))
    area = sum(m.used_rows * m.used_columns for m in report.matrices) / report.entries
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return Method(model, optimizer, report.selected, area)


def _spft_of(salience: str, scope: str) -> Callable[..., Method]:
    return lambda base, rank, tokens: spft(base, rank, tokens, salience, scope)


METHODS: dict[str, Callable[..., Method]] = {
    "limit": limit,
    "spft gradient": _spft_of("gradient", "layer"),
    "spft gradient row": _spft_of("gradient", "row"),
    "spft random": _spft_of("random", "layer"),
    "lora": lora,
    "shira": shira,
    "full": full,
}
