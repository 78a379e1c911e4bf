"""What `axolotl spft plan` expects of each engine against the peaks of real runs on two CPU ranks.

    python -m integration.engines.memory [--output integration/engines/memory.json]

A peak is the most bytes that torch's allocator held, as `torch.cuda.max_memory_allocated` tells on a GPU: the profiler
reports a CPU's allocations. Under ZeRO-3 gloo's threads free what was gathered, unseen by it; there the peak is that of
the process' resident size. The command fails when a plan is more than a tenth off.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from axolotl.integrations.base import BasePlugin
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from axolotl_spft.bench.machine import machine
from axolotl_spft.bench.memory import PeakMemory as PeakMemoryOfProcess
from axolotl_spft.engine.zero3 import is_partitioned
from axolotl_spft.planning.estimate import GIB, estimate
from axolotl_spft.planning.settings import read_settings
from axolotl_spft.planning.shapes import find_config, read_shape
from axolotl_spft.salience.release import give_back_memory
from integration.engines.cases import ENGINES, RANKS, write_case
from integration.engines.run import train
from integration.engines.workspace import make_workspace

TOLERANCE = 0.1
_MARK = "spft: the mask is chosen"
_SHAPE: dict[str, Any] = {
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
_RUN: dict[str, Any] = {
    "plugins": ["axolotl_spft.SpftPlugin", "integration.engines.memory.PeakMemory"],
    "spft": {"density": 0.02, "samples": 8, "salience": "snip"},
    "sequence_len": 256, "pad_to_sequence_len": True, "max_steps": 2, "save_strategy": "no", "save_steps": None,
    "auto_resume_from_checkpoints": None, "val_set_size": 0,
}  # fmt: skip


class PeakMemory(BasePlugin):
    """Writes ``memory-<rank>.json`` into the run's folder; stands behind SpftPlugin in the list of plugins."""

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        partitioned = any(is_partitioned(parameter) for parameter in model.parameters())
        self._peaks = (_Resident if partitioned else _Allocated)(held_bytes(model))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        # after the salience pass, which runs in this hook of the plugin before
        self._peaks.next()
        trainer.add_callback(_AtTheEnd(self._peaks, Path(cfg.output_dir)))


class _Allocated:
    """The peaks of two phases, by the profiler's record of the allocator."""

    def __init__(self, held: int):
        self._held = held
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def next(self) -> None:
        with torch.profiler.record_function(_MARK):
            pass

    def finish(self) -> list[int]:
        self._profiler.stop()
        peaks, total = [self._held], self._held
        for event in sorted(self._profiler.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
            if event.name() == _MARK:
                peaks.append(total)
            elif event.name() == "[memory]":
                total += event.nbytes()
                peaks[-1] = max(peaks[-1], total)
        return peaks


class _Resident:
    """The peaks of two phases, by how far the process' resident size grows."""

    def __init__(self, held: int):
        give_back_memory()
        self._before = psutil.Process().memory_info().rss - held
        self._peak, self._peaks = PeakMemoryOfProcess(torch.device("cpu"), own_process=True), []
        self._peak.reset()

    def next(self) -> None:
        self._peaks.append(self._peak.peak_bytes() - self._before)
        give_back_memory()
        self._peak.reset()

    def finish(self) -> list[int]:
        return [*self._peaks, self._peak.peak_bytes() - self._before]


class _AtTheEnd(TrainerCallback):
    def __init__(self, peaks: _Allocated | _Resident, folder: Path):
        self._peaks, self._folder = peaks, folder

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"memory-{os.environ.get('RANK', 0)}.json"
        path.write_text(json.dumps(self._peaks.finish()))


def held_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, of those that ZeRO-3 has partitioned the part of this rank."""
    tensors = [getattr(each, "ds_tensor", each) for each in (*model.parameters(), *model.buffers())]
    return sum({_place(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def make_base(folder: Path, width: int) -> None:
    """The workspace of the engines' tests with a wider base model."""
    make_workspace(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=43 * width // 16, **_SHAPE)
    ).save_pretrained(folder / "base")


def planned(config: Path, ranks: int) -> tuple[int, int]:
    """The peaks that are planned for the salience pass and for training, without the reserve."""
    run = read_settings(config, ranks)
    found = estimate(read_shape(find_config(run.base_model, None)[0], run.options), run, 80 * GIB)
    return found.salience_peak, found.peak


def measure(folder: Path, engine: str) -> dict[str, Any]:
    """One row: the largest peaks over the ranks, and what is planned."""
    ranks = 1 if engine == "single" else RANKS
    config = write_case(folder, engine, engine, ranks, **_RUN)
    with _large_blocks_given_back():
        train(config, ranks)
    measured = [json.loads(path.read_text()) for path in sorted(config.with_suffix("").glob("memory-*.json"))]
    peaks = [max(each) for each in zip(*measured, strict=True)]
    return {"engine": engine, "peaks": peaks, "planned": planned(config, ranks)}


@contextmanager
def _large_blocks_given_back() -> Iterator[None]:
    """Let glibc give large blocks back to the system when they are freed, in the processes started here."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**17)
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, in MiB."""
    lines = ["| engine | salience pass, MiB | planned | training, MiB | planned |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{value / 2**20:.0f}" for pair in zip(row["peaks"], row["planned"]) for value in pair]
        lines.append(f"| {row['engine']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worst(rows: list[dict[str, Any]]) -> float:
    """The largest relative difference."""
    return max(abs(plan / peak - 1) for row in rows for peak, plan in zip(row["peaks"], row["planned"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    parser.add_argument(
        "--width", type=int, default=1024, help="hidden size: at 1024 what the libraries take is a few percent"
    )
    parser.add_argument("--keep", type=Path, help="run in this new folder and leave everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_base(folder, options.width)
        rows = [measure(folder, engine) for engine in tqdm(("single", *ENGINES), unit="run")]
    print(table(rows))
    if options.output:
        record = {"machine": machine(), "width": options.width, "rows": rows}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if worst(rows) > TOLERANCE:
        raise SystemExit(f"a plan is {100 * worst(rows):.0f}% off")


if __name__ == "__main__":
    main()
