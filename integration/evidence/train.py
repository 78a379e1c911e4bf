"""One run: load, adapt, judge, train, judge."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from integration.evidence.bases import base_folder, load_base, load_tokenizer
from integration.evidence.judge import batch_of, encode, judge, mean_loss
from integration.evidence.methods import METHODS, Ready, Setting, rms_of_projections
from integration.evidence.tasks import Example, Task, load_task


def train(run: dict[str, Any], data: Path | None, bases: Path) -> dict[str, float]:
    """Carry out a run of `experiment.runs_of`.

    Returns:
        ``before_*`` and ``after_*`` figures of `judge`, the trained count, and what a step and the set-up took. A loss
        that is no number ends a run early; its ``after_*`` figures are then infinite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, run["dtype"])
    half = dtype == torch.bfloat16
    worked = time.process_time()
    torch.manual_seed(run["seed"])
    folder = base_folder(run["base"], bases)
    tokenizer, task, rows = _encoded(folder, run["task"], data, run["judged"], run["texts"], run["length"])
    # the sample of masks and statistics, the same for all seeds; some or most of it is trained too
    sample = random.Random(1).sample(rows, min(run["samples"], len(rows)))

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(sample), run["batch"]):
            yield batch_of(sample[start : start + run["batch"]], tokenizer.pad_token_id, device)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return mean_loss(model, batch, half)

    def judged(model: nn.Module) -> dict[str, float]:
        return judge(model, tokenizer, task, run["length"], half)

    started = time.perf_counter()
    setting = Setting(
        base=load_base(folder, run["bits"], dtype, device),
        options=_with_mask_file(run, bases),
        learning_rate=run["learning_rate"],
        batches=batches,
        loss_of=loss_of,
        seed=run["seed"],
        unquantized=lambda: load_base(folder, 16, dtype, device),
    )
    ready = METHODS[run["method"]](setting)
    result = {"trained": ready.trained, "train_rows": len(rows), "setup_seconds": time.perf_counter() - started}
    if run["method"] == "none" and run["bits"] == 16:
        result["weight_rms"] = rms_of_projections(ready.model)
    of_base = tuple(run[name] for name in ("base", "task", "bits", "dtype", "judged", "texts", "length"))
    if ready.moved or of_base not in _JUDGED_BASES:
        before = judged(ready.model)
        if not ready.moved:
            _JUDGED_BASES[of_base] = before
    else:
        before = _JUDGED_BASES[of_base]
    result |= {f"before_{name}": value for name, value in before.items()}
    if ready.optimizer is not None:
        order = _order(len(rows), run["steps"] * run["batch"], run["seed"])
        steps = (
            batch_of([rows[i] for i in order[first : first + run["batch"]]], tokenizer.pad_token_id, device)
            for first in range(0, len(order), run["batch"])
        )
        trained = _train(ready, steps, loss_of, run)
        after = judged(ready.model) if math.isfinite(trained["train_loss"]) else dict.fromkeys(before, math.inf)
        result |= trained | {f"after_{name}": value for name, value in after.items()}
    result["cpu_seconds"] = time.process_time() - worked
    result["peak_resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


# options of methods that have a mask, and no part in it
_OF_NO_MASK = ("relative_rate", "r", "alpha", "low_rank_rate", "reselect")
# what a base is worth before any training, for all methods that start there
_JUDGED_BASES: dict[tuple, dict[str, float]] = {}


@functools.lru_cache(maxsize=1)
def _encoded(
    folder: str, name: str, data: Path | None, judged: int, texts: int, length: int
) -> tuple[PreTrainedTokenizerBase, Task, list[tuple[list[int], list[int]]]]:
    """Tokenizer, task, and the rows to train; examples of more than ``length`` tokens are left out of both parts."""
    tokenizer = load_tokenizer(folder)

    def fits(example: Example) -> bool:
        answers = {example.answer, *example.choices}
        return all(len(encode(tokenizer, example.prompt, answer, length + 1)[0]) <= length for answer in answers)

    task = load_task(name, data, judged, texts, fits)
    rows = [encode(tokenizer, example.prompt, example.answer, length) for example in task.train]
    return tokenizer, task, rows


def _with_mask_file(run: dict[str, Any], bases: Path) -> dict[str, Any]:
    """The options, with the mask's file where there is one: rates share it, and seeds unless it depends on them."""
    if run["method"] not in ("spft", "both"):
        return run["options"]
    options = {"samples": run["samples"], **run["options"]}
    of_a_mask = {name: run[name] for name in ("base", "task", "bits", "dtype", "length", "batch")} | options
    for name in _OF_NO_MASK:
        of_a_mask.pop(name, None)
    warmed_up = "score_after" in options
    salience = options.get("salience", "")
    # a function of one's own may draw
    if warmed_up or salience == "random" or ":" in salience:
        of_a_mask["seed"] = run["seed"]
    if warmed_up:
        of_a_mask["learning_rate"] = run["learning_rate"]
    folder = bases / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(of_a_mask, sort_keys=True).encode()).hexdigest()[:24]
    return options | {"mask_path": str(folder / f"{name}.safetensors")}


def _order(rows: int, wanted: int, seed: int) -> list[int]:
    """Shuffled epochs, one behind the other."""
    mix = random.Random(seed)
    epochs = (mix.sample(range(rows), rows) for _ in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(epochs), wanted))


def _train(
    ready: Ready,
    batches: Iterator[dict[str, Tensor]],
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    run: dict[str, Any],
) -> dict[str, float]:
    """Linear warm-up and decay, gradients clipped to a norm of 1."""
    model, optimizer, dynamic = ready.model, ready.optimizer, ready.dynamic
    warmup = max(1, math.ceil(run["warmup"] * run["steps"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (run["steps"] - step) / (run["steps"] - warmup + 1))
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    losses, seconds, busy = [], [], []
    with tqdm(batches, total=run["steps"], desc="Training", unit="step", leave=False) as bar:
        for step, batch in enumerate(bar, 1):
            started, worked = time.perf_counter(), time.process_time()
            due = dynamic is not None and dynamic.options.is_due(step, run["steps"])
            with dynamic.collecting() if due else nullcontext():
                loss = loss_of(model, batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if due:
                dynamic.reselect(optimizer, step)
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return {"train_loss": math.inf}
            seconds.append(time.perf_counter() - started)
            # what does not grow when others use the machine
            busy.append(time.process_time() - worked)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "train_loss": sum(last) / len(last),
        "step_seconds": statistics.median(seconds),
        "step_cpu_seconds": statistics.median(busy),
    }
