"""The protocol: 5,000 steps of 4 examples, cosine decay after a tenth of warm-up, greedy answers to GSM8K."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from integration.evidence.evaluation import evaluating
from integration.method_comparison.answers import accuracy
from integration.method_comparison.data import Data, Pair

# batches whose examples are put together by length
_BUCKET = 20


class Trained(NamedTuple):
    """Figures of a run as PEFT's comparison keeps them."""

    metrics: list[dict[str, float]]
    train_time: float
    memory: list[int]


def batches(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The training set in its own order, again and again: buckets of 20 batches, each sorted from long to short.

    Padding is the end of text, and one such token behind an answer counts where there is one.
    """
    size, longest = settings["batch_size"], settings["max_seq_length"]
    while True:
        for start in range(0, len(pairs), size * _BUCKET):
            texts = [
                settings["query_template"].format(query=pair.query) + pair.response
                for pair in pairs[start : start + size * _BUCKET]
            ]
            rows = sorted((ids[:longest] for ids in tokenizer(texts)["input_ids"]), key=len, reverse=True)
            for first in range(0, len(rows), size):
                batch = tokenizer.pad({"input_ids": rows[first : first + size]}, return_tensors="pt")
                labels = batch["input_ids"].clone()
                for row, ids in zip(labels, rows[first : first + size]):
                    row[len(ids) + 1 :] = -100
                yield {**{name: each.to(device) for name, each in batch.items()}, "labels": labels.to(device)}


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    settings: Mapping[str, Any],
    make_optimizer: Callable[..., torch.optim.Optimizer],
    unit: float = 1.0,
) -> Trained:
    """Train ``settings["max_steps"]`` steps, with an evaluation every ``eval_steps`` and the test at the end.

    ``unit``: what the learning rate of the settings is a multiple of.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    steps, every = settings["max_steps"], settings["eval_steps"]
    with model.disable_adapter():
        text_loss_before = text_loss(model, tokenizer, data.texts, settings)
    options = settings["optimizer_kwargs"]
    optimizer = make_optimizer(model.parameters(), **options | {"lr": options["lr"] * unit})
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    metrics, losses, seconds, tokens, memory, allocated = [], [], [], [], [], []
    begun, judging = time.perf_counter(), 0.0
    model.train()
    with tqdm(total=steps, desc="Training", unit="step") as bar:
        for step, batch in zip(range(1, steps + 1), batches(data.train, tokenizer, settings, device)):
            started = time.perf_counter()
            # one end of text is counted for each example
            tokens.append(int(batch["attention_mask"].sum()) + len(batch["input_ids"]))
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            if settings["grad_norm_clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), settings["grad_norm_clip"])
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            memory.append(torch.cuda.memory_reserved() if on_gpu else 0)
            allocated.append(torch.cuda.memory_allocated() if on_gpu else 0)
            seconds.append(time.perf_counter() - started)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if step % every == 0:
                started = time.perf_counter()
                right = judge(model, tokenizer, data.valid, settings)
                judging += time.perf_counter() - started
                metrics.append(
                    {
                        "step": step,
                        "valid accuracy": right,
                        "train loss": sum(losses[-every:]) / every,
                        "train samples": step * settings["batch_size"],
                        "train time": sum(seconds[-every:]),
                        "eval time": time.perf_counter() - started,
                        "tokens / sec": sum(tokens[-every:]) / sum(seconds[-every:]),
                        "mem allocated avg": sum(allocated[-every:]) / every,
                        "mem reserved avg": sum(memory[-every:]) / every,
                        "elapsed time": time.perf_counter() - begun,
                    }
                )
    metrics.append(
        {
            "step": steps,
            "test accuracy": judge(model, tokenizer, data.test, settings),
            "train loss": sum(losses[-every:]) / every,
            "train samples": steps * settings["batch_size"],
            "train total tokens": sum(tokens),
            "forgetting": text_loss(model, tokenizer, data.texts, settings) - text_loss_before,
        }
    )
    return Trained(metrics, time.perf_counter() - begun - judging, memory)


@torch.inference_mode()
def judge(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], settings: Mapping[str, Any]
) -> float:
    """The share of right answers, generated greedily."""
    with evaluating(model):
        device, answers, size = next(model.parameters()).device, [], settings["batch_size_eval"]
        for start in tqdm(range(0, len(pairs), size), desc="Answers", unit="batch", leave=False):
            prompts = [settings["query_template"].format(query=pair.query) for pair in pairs[start : start + size]]
            rows = {"input_ids": [ids[: settings["max_seq_length"]] for ids in tokenizer(prompts)["input_ids"]]}
            batch = tokenizer.pad(rows, return_tensors="pt", padding_side="left").to(device)
            options = dict(settings["generation_kwargs"])
            # the smaller of both limits
            most = options.pop("max_new_tokens", None), options.pop("max_length", None)
            length = batch["input_ids"].shape[1]
            limits = [most[0] + length] * (most[0] is not None) + [most[1]] * (most[1] is not None)
            config = GenerationConfig(**options, max_length=min(limits), pad_token_id=tokenizer.pad_token_id)
            generated = model.generate(**batch, generation_config=config)
            answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return accuracy(answers, [pair.response for pair in pairs])


@torch.inference_mode()
def text_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Mapping[str, Any]
) -> float:
    """The mean loss of all tokens of the texts, each cut at 768."""
    with evaluating(model):
        device, losses = next(model.parameters()).device, []
        for start in range(0, len(texts), settings["batch_size"]):
            part = tokenizer(list(texts[start : start + settings["batch_size"]]), truncation=True, max_length=768)
            batch = tokenizer.pad({"input_ids": part["input_ids"]}, return_tensors="pt").to(device)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].float().flatten(0, 1)
            losses.append(F.cross_entropy(logits, labels, reduction="none")[labels >= 0])
    return torch.cat(losses).double().mean().item()
