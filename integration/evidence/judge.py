"""What a model is worth: loss of answers, loss of text, and how often the right answer is the likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

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


def judge(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, length: int) -> dict[str, float]:
    """``task_loss`` and ``<text>_loss`` (mean over tokens), and ``accuracy`` where the task has choices."""
    was_training = model.training
    model.eval()
    answers = [encode(tokenizer, example.prompt, example.answer, length) for example in task.test]
    results = {"task_loss": _mean_loss(model, tokenizer, answers)}
    for name, texts in task.untouched.items():
        rows = [encode(tokenizer, "", text, length) for text in texts]
        results[f"{name}_loss"] = _mean_loss(model, tokenizer, rows)
    if task.test[0].choices:
        results["accuracy"] = _accuracy(model, tokenizer, task.test, length)
    model.train(was_training)
    return results


def _mean_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple]) -> float:
    losses = torch.cat(list(_token_losses(model, tokenizer, rows)))
    return losses.double().mean().item()


@torch.inference_mode()
def _token_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple], batch_size: int = 16
) -> Iterator[Tensor]:
    """The losses of each row's counted tokens."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = batch_of(rows[start : start + batch_size], tokenizer.pad_token_id, device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        yield from (row[wanted] for row, wanted in zip(losses.cpu(), (labels != IGNORED).cpu()))


def _accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> float:
    """How often the right answer has the highest log-likelihood per character."""
    rows = [encode(tokenizer, each.prompt, choice, length) for each in examples for choice in each.choices]
    totals = iter([losses.sum().item() for losses in _token_losses(model, tokenizer, rows)])
    right = 0
    for example in examples:
        scores = {choice: next(totals) / len(choice) for choice in example.choices}
        right += min(scores, key=scores.get) == example.answer
    return right / len(examples)
