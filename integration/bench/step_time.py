"""Time and memory of a training step: sparse fine-tuning beside LoRA, SHiRA, full fine-tuning and the limit.

    python -m integration.bench.step_time [--methods ...] [--rounds 15] [--output step_time.json]

All methods live in one process and take turns, so that a ratio of medians compares like with like. The default model
is a Llama of 45 million parameters in bf16, the trained count that of 1% of its linear weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from integration.bench.measure import bytes_kept_for_backward, machine, step_seconds, train_step
from integration.bench.methods import METHODS, make_base, text_batch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=6, help="LoRA's rank; all methods train as many parameters")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict]:
    """One row per method: seconds of each round, bytes kept for backward, trained count, the mask's area."""
    batch = text_batch(options.vocabulary, options.tokens)
    methods = {}
    for name in options.methods:
        base = make_base(
            options.hidden, options.intermediate, options.layers, options.vocabulary, _DTYPES[options.dtype]
        )
        methods[name] = METHODS[name](base, rank=options.rank, tokens=options.tokens)
        methods[name].model.train()
        train_step(methods[name], batch)
        train_step(methods[name], batch)
    kept = {name: bytes_kept_for_backward(method, batch) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    gc.collect()
    gc.disable()
    for round_ in tqdm(range(options.rounds), desc="Rounds"):
        # every other round backwards: no method always runs after the same one
        for name in list(methods) if round_ % 2 else reversed(methods):
            seconds[name].append(step_seconds(methods[name], batch))
    gc.enable()
    return [
        {
            "method": name,
            "seconds": seconds[name],
            "median_seconds": statistics.median(seconds[name]),
            "kept_bytes": kept[name],
            "trained": method.trained,
            "area": method.area,
        }
        for name, method in methods.items()
    ]


def table(rows: list[dict]) -> str:
    """The rows with ratios to the limit and to LoRA."""
    by_name = {row["method"]: row for row in rows}

    def ratio(row: dict, key: str, to: str) -> str:
        return f"{row[key] / by_name[to][key]:.3f}" if to in by_name else "-"

    lines = [
        f"{'method':18} {'median s':>9} {'spread':>7} {'/ limit':>8} {'/ LoRA':>8} "
        f"{'kept MiB':>9} {'/ LoRA':>8} {'trained':>10} {'area':>7}"
    ]
    for row in rows:
        quartiles = statistics.quantiles(row["seconds"], n=4)
        spread = (quartiles[2] - quartiles[0]) / row["median_seconds"]
        area = f"{100 * row['area']:.1f}%" if row["area"] is not None else "-"
        lines.append(
            f"{row['method']:18} {row['median_seconds']:9.4f} {100 * spread:6.1f}% "
            f"{ratio(row, 'median_seconds', 'limit'):>8} {ratio(row, 'median_seconds', 'lora'):>8} "
            f"{row['kept_bytes'] / 2**20:9.1f} {ratio(row, 'kept_bytes', 'lora'):>8} {row['trained']:10,} {area:>7}"
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(table(rows))
    if options.output:
        figures = {"machine": machine(), "options": vars(options) | {"output": str(options.output)}, "rows": rows}
        options.output.write_text(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    main()
