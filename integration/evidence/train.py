"""One run: load, adapt, judge, train, judge."""

from __future__ import annotations

import itertools
import math
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from integration.evidence.bases import base_folder, load_base, load_tokenizer
from integration.evidence.judge import batch_of, encode, judge
from integration.evidence.methods import METHODS, Setting
from integration.evidence.tasks import load_task


def train(run: dict[str, Any], data: Path, bases: Path) -> dict[str, float]:
    """Carry out a run of `experiment.runs_of`.

    Returns:
        ``before_*`` and ``after_*`` figures of `judge`, the trained count, and what a step and the set-up took.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, run["dtype"])
    torch.manual_seed(run["seed"])
    folder = base_folder(run["base"], bases)
    task = load_task(run["task"], data, run["judged"])
    tokenizer = load_tokenizer(folder)
    encoded = [encode(tokenizer, example.prompt, example.answer, run["length"]) for example in task.train]
    # an answer that the length cuts off whole would give no loss
    rows = [row for row in encoded if any(label != -100 for label in row[1])]
    # the sample of masks and statistics, the same for all seeds and none of the trained order
    sample = random.Random(1).sample(rows, min(run["samples"], len(rows)))

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(sample), run["batch"]):
            yield batch_of(sample[start : start + run["batch"]], tokenizer.pad_token_id, device)

    started = time.perf_counter()
    ready = METHODS[run["method"]](
        Setting(
            load_base(folder, run["bits"], dtype, device),
            _spft_samples(run),
            run["learning_rate"],
            batches,
            run["seed"],
            lambda: load_base(folder, 16, dtype, device),
        )
    )
    result = {"trained": ready.trained, "setup_seconds": time.perf_counter() - started}
    result |= {f"before_{name}": value for name, value in judge(ready.model, tokenizer, task, run["length"]).items()}
    if ready.optimizer is not None:
        order = _order(len(rows), run["steps"] * run["batch"], run["seed"])
        steps = (
            batch_of([rows[i] for i in order[first : first + run["batch"]]], tokenizer.pad_token_id, device)
            for first in range(0, len(order), run["batch"])
        )
        result |= _train(ready.model, ready.optimizer, steps, run)
        after = judge(ready.model, tokenizer, task, run["length"])
        result |= {f"after_{name}": value for name, value in after.items()}
    result["peak_resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _spft_samples(run: dict[str, Any]) -> dict[str, Any]:
    """The options, with as many samples as the run has for all of a method's statistics."""
    return {"samples": run["samples"], **run["options"]} if run["method"] == "spft" else run["options"]


def _order(rows: int, wanted: int, seed: int) -> list[int]:
    """Shuffled epochs, one behind the other."""
    mix = random.Random(seed)
    epochs = (mix.sample(range(rows), rows) for _ in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(epochs), wanted))


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]], run: dict[str, Any]
) -> dict[str, float]:
    """Linear warm-up and decay, gradients clipped to a norm of 1."""
    warmup = max(1, math.ceil(run["warmup"] * run["steps"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (run["steps"] - step) / (run["steps"] - warmup + 1))
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    losses, seconds = [], []
    with tqdm(batches, total=run["steps"], desc="Training", unit="step", leave=False) as bar:
        for batch in bar:
            started = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, len(losses) // 10) :]
    return {"train_loss": sum(last) / len(last), "step_seconds": sorted(seconds)[len(seconds) // 2]}
