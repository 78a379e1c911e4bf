"""What a dynamic mask costs beside a static one: two trainings that take turns, step by step.

    python -m integration.bench.dynamic [--output integration/bench/dynamic.json]

Both train the same model (llama-45m of `axolotl spft bench`) on the same rows; one exchanges 20% of its values after
every 100 steps. The ratio is that of the whole times of 200 steps, two re-selections among them; beside it stands what
the two alone add, which says more where other programs run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from axolotl_spft import DynamicMask, SparseAdamW, SpftConfig, select_mask
from axolotl_spft.bench.base import TORCH_DTYPES, make_base, text_batch
from axolotl_spft.bench.machine import machine
from axolotl_spft.bench.memory import synchronize
from axolotl_spft.bench.shapes import DEFAULT_SHAPE, model_config

STEPS, EVERY, FRACTION, DENSITY = 200, 100, 0.2, 0.005


class Run:
    """One of the two trainings."""

    def __init__(self, options: argparse.Namespace, dynamic: bool):
        self.device = torch.device(options.device)
        config = model_config(options.model, options.tokens, options.width)
        base = make_base(config, TORCH_DTYPES[options.dtype], self.device)
        self.model: nn.Module = get_peft_model(base, SpftConfig(density=DENSITY, samples=4))
        self.batches = [text_batch(config.vocab_size, options.tokens, self.device, index) for index in range(8)]
        select_mask(self.model, self.batches[:4])
        self.model.train()
        self.optimizer = SparseAdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.mask = DynamicMask(self.model, fraction=FRACTION) if dynamic else None
        self.seconds: list[float] = []
        self.reselection_seconds: list[float] = []

    def step(self, number: int, timed: bool = True) -> None:
        """A forward and a backward pass, an optimizer step, and a re-selection where it is due."""
        due = timed and self.mask is not None and number % EVERY == 0
        synchronize(self.device)
        start = time.perf_counter()
        if due:
            with self.mask.collecting():
                self._backward(number)
        else:
            self._backward(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if due:
            self.mask.reselect(self.optimizer, number)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        if timed:
            self.seconds.append(seconds)
            self.reselection_seconds += [seconds] if due else []

    def _backward(self, number: int) -> None:
        self.model(**self.batches[number % len(self.batches)]).loss.backward()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    if options.threads:
        torch.set_num_threads(options.threads)
    static, dynamic = runs = [Run(options, each) for each in (False, True)]
    for run in runs:
        for number in range(3):
            run.step(number, timed=False)
    for number in tqdm(range(1, STEPS + 1), desc="Steps of each", unit="step"):
        # either goes first as often as the other
        for run in runs if number % 2 else reversed(runs):
            run.step(number)
    step = statistics.median(static.seconds)
    # in steps of the static run: without what other programs on the machine do to the other 198
    steps_per_reselection = statistics.mean(dynamic.reselection_seconds) / step - 1
    return {
        "machine": machine(),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "steps": STEPS,
        "every": EVERY,
        "fraction": FRACTION,
        "density": DENSITY,
        "static_seconds": sum(static.seconds),
        "dynamic_seconds": sum(dynamic.seconds),
        "ratio": sum(dynamic.seconds) / sum(static.seconds),
        "step_seconds": step,
        "steps_per_reselection": steps_per_reselection,
        "ratio_by_reselections": 1 + steps_per_reselection / EVERY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    parser.add_argument("--model", default=DEFAULT_SHAPE, help="a shape of `axolotl spft bench`, or a config.json")
    parser.add_argument("--width", type=int, help="another hidden_size, with everything else in proportion")
    parser.add_argument("--tokens", type=int, default=512, help="of the row that a step trains on (512)")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    options = parser.parse_args()
    record = measure(options)
    print(json.dumps(record, indent=1))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
