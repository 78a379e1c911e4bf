"""A folder with a tiny base model, a tokenizer and an instruction set, and Axolotl configurations for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)


def make_workspace(folder: Path) -> Path:
    """Write ``base/`` (a Llama of some 60k parameters with a tokenizer) and ``train.jsonl`` (40 examples)."""
    rows = [
        {
            "instruction": f"Add {a} and {a * 7 % 13}.",
            "input": "",
            "output": f"The sum is {a + a * 7 % 13}." + " It is so." * (a % 4),
        }
        for a in range(40)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["instruction"] + row["output"] for row in rows), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).save_pretrained(folder / "base")
    return folder


def make_experts(folder: Path) -> Path:
    """Write ``experts/`` into a workspace: a Mixtral of the same tokenizer, whose path is returned."""
    target = folder / "experts"
    shutil.copytree(folder / "base", target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    of_llama = LlamaConfig.from_pretrained(folder / "base")
    same = {name: getattr(of_llama, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
                                                       "max_position_embeddings", "num_attention_heads",
                                                       "num_key_value_heads", "num_hidden_layers")}  # fmt: skip
    torch.manual_seed(0)
    # sizes that grouped products take
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**same, **sizes)).save_pretrained(target)
    return target


def make_tied(folder: Path) -> Path:
    """Write ``tied/`` into a workspace: its Llama with a tied head and biases in its attention; returns the path."""
    target = folder / "tied"
    shutil.copytree(folder / "base", target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig.from_pretrained(folder / "base", tie_word_embeddings=True, attention_bias=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def write_config(folder: Path, name: str, **changes) -> Path:
    """Write ``<name>.yml`` with ``output_dir`` ``<name>/``; a change to None leaves the key out."""
    config = {
        "base_model": str(folder / "base"),
        "plugins": ["axolotl_spft.SpftPlugin"],
        "adapter": "spft",
        "spft": {"density": 0.05, "samples": 8},
        "optimizer": "sparse_adamw",
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "datasets": [{"path": str(folder / "train.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 0.2,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "no",
        "bf16": False,
        "output_dir": str(folder / name),
        "seed": 7,
        "special_tokens": {"pad_token": "<pad>"},
        "dataloader_num_workers": 0,
    }
    config.update(changes)
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path
