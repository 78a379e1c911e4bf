"""What a model is worth: loss of answers, loss of text, and how often the right answer is the likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from integration.evidence.evaluation import evaluating
from integration.evidence.tasks import Example, Task

IGNORED = -100


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of at most ``length`` tokens; only the answer's tokens, and its end, count."""
    start = tokenizer(prompt)["input_ids"] if prompt else []
    if not prompt and tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    end = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*start, *end][:length], [*[IGNORED] * len(start), *end][:length]


def batch_of(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """Rows padded on the right to one length: (rows, longest)."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: list[int], value: int) -> list[int]:
        return [*values, *[value] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(ids, pad) for ids, _ in rows], device=device),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows], device=device),
        "labels": torch.tensor([padded(labels, IGNORED) for _, labels in rows], device=device),
    }


def judge(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, length: int, half: bool = False
) -> dict[str, float]:
    """``task_loss`` and ``<text>_loss`` (mean over tokens), and ``accuracy`` where the task has choices."""
    with evaluating(model):
        answers = [encode(tokenizer, example.prompt, example.answer, length) for example in task.test]
        results = {"task_loss": mean_of_tokens(model, tokenizer, answers, half)}
        for name, texts in task.untouched.items():
            rows = [encode(tokenizer, "", text, length) for text in texts]
            results[f"{name}_loss"] = mean_of_tokens(model, tokenizer, rows, half)
        if task.test[0].choices:
            results["accuracy"] = _accuracy(model, tokenizer, task.test, length, half)
    return results


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor], half: bool) -> Tensor:
    """The mean loss of a batch's counted tokens: what is trained, and what masks are chosen by."""
    losses, counted = token_losses(model, batch, half)
    return losses.sum() / counted.sum()


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], half: bool) -> tuple[Tensor, Tensor]:
    """Losses of (rows, tokens) from the first counted token on, 0 where a token does not count, and which count.

    The head, a fifth or more of a small model's work, is spared for the prompts that all rows have in front. ``half``
    is autocast to bf16, as a trainer's ``bf16: true`` has it: adapters keep fp32 and compute in bf16.
    """
    labels = batch["labels"]
    first = max(1, int((labels != IGNORED).any(0).float().argmax()))
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=half):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        # by index, which copies: the head would multiply each row by a copy of its own weight after a slice
        kept = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    labels = labels[:, first:]
    flat = logits.float().flatten(0, 1), labels.flatten()
    losses = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view_as(labels)
    return losses, labels != IGNORED


def mean_of_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple], half: bool) -> float:
    """The mean loss of the counted tokens of all rows, as `encode` makes them."""
    return torch.cat(_losses_of_rows(model, tokenizer, rows, half)).double().mean().item()


@torch.inference_mode()
def _losses_of_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple], half: bool, batch_size: int = 16
) -> list[Tensor]:
    """The losses of each row's counted tokens."""
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    # rows of like length together: less padding
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = batch_of([rows[number] for number in numbers], tokenizer.pad_token_id, device)
        losses, counted = (each.cpu() for each in token_losses(model, batch, half))
        found |= {number: row[wanted] for number, row, wanted in zip(numbers, losses, counted)}
    return [found[number] for number in range(len(rows))]


def _accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int, half: bool
) -> float:
    """How often the right answer has the highest log-likelihood per character."""
    rows = [encode(tokenizer, each.prompt, choice, length) for each in examples for choice in each.choices]
    totals = iter([losses.sum().item() for losses in _losses_of_rows(model, tokenizer, rows, half)])
    right = 0
    for example in examples:
        scores = {choice: next(totals) / len(choice) for choice in example.choices}
        right += min(scores, key=scores.get) == example.answer
    return right / len(examples)
