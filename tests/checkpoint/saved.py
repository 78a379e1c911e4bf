"""Small base models and adapters in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.tuner.record import FILE_KEY, record_of, record_to_tensor
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_moe, with_adapter

_SMALL = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}


def tiny_mixtral(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its checkpoints have other names, and a tensor for each expert, which the model has stacked."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **_SMALL,
        hidden_size=28,
        intermediate_size=22,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).to(dtype).eval()


def tiny_neox(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its checkpoints have the output embedding under another name."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SMALL, hidden_size=28, intermediate_size=46)).to(dtype).eval()


def tied_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_llama(dtype, tie_word_embeddings=True)


BASES: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "tied": tied_llama,
    "gpt2": tiny_gpt2,
    "moe": tiny_moe,
    "mixtral": tiny_mixtral,
    "neox": tiny_neox,
}


def save_base(folder: Path, make: Callable[..., nn.Module], dtype=torch.bfloat16, max_shard_size="20KB") -> Path:
    make(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer_config.json").write_text('{"of": "base"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 0, scale: float = 0.05, **options) -> Path:
    """A random adapter, with values as small as a training leaves them."""
    model = with_adapter(AutoModelForCausalLM.from_pretrained(base), seed, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "spft_values" in name:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    return folder


def make_older(folder: Path) -> Path:
    """Take out of an adapter's file what earlier versions did not record: what it was trained on."""
    tensors = load_file(folder / WEIGHTS_FILE)
    record = {key: value for key, value in record_of(tensors).items() if key != "trained_on"}
    save_file(tensors | {FILE_KEY: record_to_tensor(record)}, folder / WEIGHTS_FILE)
    return folder


def merged_in_memory(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
