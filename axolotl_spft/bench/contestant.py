"""One method from its base model to its figures."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from axolotl_spft.bench.base import TORCH_DTYPES, make_base, target_modules, text_batch
from axolotl_spft.bench.footprint import footprint_bytes
from axolotl_spft.bench.kept import kept_for_backward
from axolotl_spft.bench.mask_statistics import MaskStatistics
from axolotl_spft.bench.masking import Masking
from axolotl_spft.bench.memory import PeakMemory, synchronize
from axolotl_spft.bench.methods import METHODS, Budget, Method
from axolotl_spft.bench.options import Options
from axolotl_spft.bench.serving import file_bytes, switch_seconds
from axolotl_spft.bench.shapes import model_config

_WARM_UP_STEPS = 2
# a processor that has rested is faster at first: of methods that run one after the other the first would gain by it
_WARM_UP_SECONDS = 5.0


class Contestant:
    """A method that takes its turns: `round` as often as wanted, then `figures` once."""

    def __init__(self, name: str, options: Options, own_process: bool):
        self.name, self.options = name, options
        if own_process:
            set_threads(options)
        self.device = torch.device(options.device)
        self.memory = PeakMemory(self.device, own_process)
        base = make_base(
            model_config(options.model, options.tokens, options.width), TORCH_DTYPES[options.dtype], self.device,
            options.quantization, options.gradient_checkpointing,
        )  # fmt: skip
        targets = target_modules(base)
        budget = Budget.of(base, options.rank, options.density)
        self.batch = text_batch(base.config.vocab_size, options.tokens, self.device)
        self.method: Method = METHODS[name].build(base, budget, self._masking())
        self.method.model.train()
        for _ in range(_WARM_UP_STEPS):
            self._step()
        self.kept = kept_for_backward(self.method.model, self.batch, targets)
        self.footprint = footprint_bytes(self.method)
        if self.method.optimizer is not None:
            self.method.optimizer.zero_grad()
        self.memory.settle()
        if options.processes == "sequential":
            self._get_warm()
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []

    def _masking(self) -> Masking:
        options = self.options
        # a mask of a given area, and the random control, need no statistics
        drawn = options.mask == "drawn" and options.area is None
        statistics_ = None
        if drawn and self.name.startswith("spft-") and self.name != "spft-random":
            statistics_ = MaskStatistics.read(options.mask_statistics)
        return Masking(self.device, self.memory, options.tokens, options.samples, options.area, statistics_)

    def _step(self) -> None:
        """Forward, backward, and the optimizer's step."""
        self.method.model(**self.batch).loss.backward()
        if self.method.optimizer is not None:
            self.method.optimizer.step()
            self.method.optimizer.zero_grad()

    def _get_warm(self) -> None:
        stop = time.monotonic() + _WARM_UP_SECONDS
        while time.monotonic() < stop:
            self._step()
            synchronize(self.device)

    def round(self) -> None:
        """One timed step."""
        self.memory.reset()
        synchronize(self.device)
        start = time.perf_counter()
        self._step()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.peaks.append(self.memory.peak_bytes())

    def figures(self) -> dict[str, Any]:
        """All that was measured, in seconds and bytes; None where a figure has no meaning or cannot be known.

        The last call: it adds and merges adapters.
        """
        method, median = self.method, statistics.median(self.seconds)
        served = self.options.serving and method.add_second is not None
        # first: a second adapter would change the file
        saved = file_bytes(method) if served else None
        return {
            "method": self.name,
            "seconds": self.seconds,
            "median_seconds": median,
            "spread": spread(self.seconds),
            "tokens_per_second": self.options.tokens / median,
            "peak_bytes": None if None in self.peaks else max(self.peaks),
            "kept_bytes": self.kept.all,
            "kept_by_adapted_bytes": self.kept.by_adapted,
            "trained": method.trained,
            "area": method.area,
            "footprint_bytes": self.footprint,
            "bytes_per_value": _per_value(self.footprint, method.trained),
            "file_bytes": saved,
            "file_bytes_per_value": None if saved is None else saved / method.trained,
            "mask": None if method.mask_cost is None else vars(method.mask_cost),
            "serving_seconds": switch_seconds(method, self.device) if served else None,
        }


def set_threads(options: Options) -> None:
    """Give torch its number of threads."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def spread(seconds: list[float]) -> float:
    """The interquartile range over the median; 0 for a single round."""
    if len(seconds) < 2:
        return 0.0
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


def _per_value(footprint: dict[str, int], trained: int) -> dict[str, float] | None:
    return {part: size / trained for part, size in footprint.items()} if trained else None


def reason_to_leave_out(name: str, options: Options) -> str | None:
    """Why a method cannot run with these options, or None."""
    return METHODS[name].not_on_4bit if options.quantization == "4bit" else None
