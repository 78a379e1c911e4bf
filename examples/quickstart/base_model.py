"""A byte-level BPE tokenizer and a tiny Llama, both trained from scratch on a list of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; every encoded text starts with the BOS token, as with Llama's own tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=max_length
    )


def token_blocks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int, seed: int) -> torch.Tensor:
    """Encode the texts, end each with EOS, join them and cut them into shuffled blocks, (blocks, length)."""
    encoded = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    blocks = stream[: len(stream) // length * length].view(-1, length)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, intermediate_size: int, layers: int, heads: int, context: int
) -> LlamaForCausalLM:
    """Make an untrained Llama with tied embeddings for this tokenizer; the caller seeds torch.

    The weights start at a standard deviation of 0.8 / sqrt(hidden_size): the usual 0.02 suits wide models, and
    a narrow one learns much slower from it.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.8 / math.sqrt(hidden_size),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, blocks: torch.Tensor, steps: int, batch_size: int, learning_rate: float) -> float:
    """Train on the blocks in order, in fp32: AdamW, linear warm-up over a tenth of the steps, cosine decay.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: if there are fewer than ``steps * batch_size`` blocks, so that text would repeat.
    """
    if steps * batch_size > len(blocks):
        raise ValueError(
            f"{steps} steps of {batch_size} blocks exceed the {len(blocks)} blocks of text: lower one of the two"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="pretraining", unit="step") as bar:
        for step in range(steps):
            batch = blocks[step * batch_size : (step + 1) * batch_size]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
