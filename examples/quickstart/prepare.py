"""Prepare the quickstart without any download: a small base model and a real instruction set.

Both come from the source of Python's standard library (see `corpus` for what is held out):

    data/train.jsonl, data/validation.jsonl    a signature in, the first paragraph of its docstring out
    base/                                      a Llama of 4 million parameters, pretrained on that source

A second run reuses what is complete and was made with the same settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import artefact
import corpus


@dataclass(frozen=True)
class DataSettings:
    """What decides the instruction set."""

    held_out_percent: int = 15
    train_rows: int = 3600
    validation_rows: int = 200
    seed: int = 0


@dataclass(frozen=True)
class BaseSettings:
    """What decides the base model."""

    held_out_percent: int = 15
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = 4
    context: int = 512
    block_length: int = 256
    steps: int = 1500
    batch_size: int = 2
    learning_rate: float = 2e-3
    seed: int = 0


def build_data(directory: Path, settings: DataSettings) -> None:
    """Write train.jsonl and validation.jsonl."""
    training, held_out = corpus.split_by_module(corpus.standard_library(), settings.held_out_percent)
    train, validation = corpus.train_and_validation(
        training, held_out, settings.train_rows, settings.validation_rows, settings.seed
    )
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "validation.jsonl", validation)
    print(f"instruction set: {len(train)} training rows, {len(validation)} held-out rows")


def build_base(directory: Path, settings: BaseSettings) -> None:
    """Train the tokenizer and the base model, and save both as a Hugging Face model directory."""
    import torch
    from base_model import pretrain, tiny_llama, token_blocks, train_tokenizer

    training, _ = corpus.split_by_module(corpus.standard_library(), settings.held_out_percent)
    texts = [source.text for source in training]
    tokenizer = train_tokenizer(texts, settings.vocab_size, settings.context)
    blocks = token_blocks(tokenizer, texts, settings.block_length, settings.seed)
    torch.manual_seed(settings.seed)
    model = tiny_llama(
        tokenizer,
        settings.hidden_size,
        settings.intermediate_size,
        settings.layers,
        settings.heads,
        settings.context,
    )
    print(f"base model: {model.num_parameters():,} parameters, {blocks.numel():,} tokens in {len(texts)} files")
    loss = pretrain(model, blocks, settings.steps, settings.batch_size, settings.learning_rate)
    print(f"base model: pretraining loss {loss:.3f} per token")
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(output: Path) -> None:
    """Make both artefacts under ``output``, or reuse them."""
    data, base = DataSettings(), BaseSettings()
    built = artefact.ensure(output / "data", asdict(data), lambda path: build_data(path, data))
    built |= artefact.ensure(output / "base", asdict(base), lambda path: build_base(path, base))
    if built:
        # Axolotl names its tokenized copies after the files, not after what is in them
        shutil.rmtree(output / "prepared", ignore_errors=True)
    print(f"{output}: {'ready' if built else 'already complete'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output",
        nargs="?",
        type=Path,
        default=Path("build/quickstart"),
        help="directory for everything (default: build/quickstart, where spft.yml looks)",
    )
    prepare(parser.parse_args().output)


if __name__ == "__main__":
    main()
