"""Record how concentrated the masks of a really trained model are, for masks that the benchmark draws.

    python -m integration.bench.record_mask_statistics [--base build/quickstart/base] [--data ...] [--output ...]

The model is the quickstart's, trained on source code, and the sample its instruction set: `make quickstart` makes both.
For each salience and scope, module type and density, over all matrices of that type: the share of the rows and of the
columns that hold an entry, the share of the entries that lie on both, and the share of the columns that this matrix or
another one that reads the same input uses.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from axolotl_spft.bench.base import target_layers
from axolotl_spft.bench.machine import machine
from axolotl_spft.bench.report import write_json
from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.ops.mask.coverage import MatrixReport
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions, used_columns
from axolotl_spft.salience.collect import gathered_gradients
from axolotl_spft.salience.metrics.metric import load_metric
from axolotl_spft.salience.metrics.statistics import Statistics
from axolotl_spft.salience.report import report_masks
from axolotl_spft.salience.select import top_k, top_k_per_row
from axolotl_spft.tuner.shared_input import group_by_input

DENSITIES = (0.001, 0.005, 0.01, 0.05)
KINDS = (("gradient", "layer"), ("gradient", "row"), ("gradient", "global"), ("balanced", "layer"))
BATCH_ROWS = 8
# Alpaca's own words, as Axolotl's `alpaca` type writes them
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def instruction_batches(
    tokenizer: PreTrainedTokenizerBase, data: Path, samples: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The first rows of a JSON-lines file, padded; only the answers' tokens count in the loss."""
    with data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(samples), file)]
    for start in range(0, len(rows), BATCH_ROWS):
        encoded = []
        for row in rows[start : start + BATCH_ROWS]:
            prompt = tokenizer(PROMPT.format(**row))["input_ids"]
            answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            encoded.append((prompt + answer, [-100] * len(prompt) + answer))
        width = max(len(ids) for ids, _ in encoded)
        yield {
            "input_ids": _padded([ids for ids, _ in encoded], width, tokenizer.pad_token_id),
            "labels": _padded([labels for _, labels in encoded], width, -100),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in encoded], width, 0),
        }


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def union_shares(masks: Mapping[str, tuple[Mask, int]]) -> dict[str, float]:
    """Matrix -> the share of its input's columns that it, or another one that reads this input, uses."""
    shares = {}
    for group in group_by_input({name: in_features for name, (_, in_features) in masks.items()}):
        in_features = masks[group[0]][1]
        union = torch.cat([used_columns(masks[name][0], in_features) for name in group]).unique()
        shares.update(dict.fromkeys(group, union.numel() / in_features))
    return shares


def shares(matrices: Sequence[MatrixReport], unions: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Module type -> row_share, column_share, union_share and area."""
    by_type: dict[str, list[MatrixReport]] = {}
    for matrix in matrices:
        by_type.setdefault(matrix.name.rpartition(".")[2], []).append(matrix)
    return {
        module: {
            "row_share": sum(m.used_rows for m in group) / sum(m.out_features for m in group),
            "column_share": sum(m.used_columns for m in group) / sum(m.in_features for m in group),
            "union_share": sum(unions[m.name] for m in group) / len(group),
            "area": sum(m.used_rows * m.used_columns for m in group) / sum(m.entries for m in group),
        }
        for module, group in by_type.items()
    }


def record(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, samples: int) -> dict[str, Any]:
    """ "<salience>/<scope>" -> module type -> the figures at each density.

    One pass gathers the gradients; every mask is selected from them by the functions that `select_mask` uses.
    """
    layers = target_layers(model)
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    model.requires_grad_(False)
    with gathered_gradients(model, layers) as gradients:
        batches = list(instruction_batches(tokenizer, data, samples))
        for batch in tqdm(batches, desc="Gradients"):
            model(**batch).loss.backward()
    recorded: dict[str, Any] = {}
    for (salience, scope), density in tqdm([(kind, density) for kind in KINDS for density in DENSITIES], desc="Masks"):
        score = load_metric(salience).score
        scores = [score(Statistics(tuple(g.shape), collected={"gradient": g})) for g in gradients.values()]
        chosen = select(scores, shapes, scope, density)
        masks = {name: (mask_from_positions(at, *shape), shape[1]) for name, at, shape in zip(layers, chosen, shapes)}
        points = recorded.setdefault(f"{salience}/{scope}", {})
        figures_of = shares(report_masks(masks, "", samples).matrices, union_shares(masks))
        for module, figures in figures_of.items():
            rounded = {key: round(value, 6) for key, value in figures.items()}
            points.setdefault(module, []).append({"density": density, **rounded})
    return recorded


def select(scores: list[Tensor], shapes: list[tuple[int, int]], scope: str, density: float) -> list[Tensor]:
    """The positions in each matrix."""
    if scope == "global":
        return top_k(scores.__getitem__, shapes, total_budget(shapes, density=density))
    counts = layer_budgets(shapes, density=density)
    if scope == "row":
        return [top_k_per_row(*each) for each in zip(scores, shapes, counts)]
    return [top_k([score].__getitem__, [shape], count)[0] for score, shape, count in zip(scores, shapes, counts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/quickstart/base"), help="the trained model")
    parser.add_argument("--data", type=Path, help="JSON lines; train.jsonl in ../data beside the model by default")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("mask_statistics.json"))
    options = parser.parse_args()
    data = options.data or options.base.parent / "data" / "train.jsonl"
    for path in (options.base / "config.json", data):
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: run `make quickstart` first, or name the model with --base")
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    content = {
        "machine": machine(),
        "command": shlex.join(["python", "-m", "integration.bench.record_mask_statistics", *_arguments(options)]),
        "model": {key: getattr(model.config, key) for key in
                  ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
        | {"parameters": model.num_parameters()},
        "samples": options.samples,
        "statistics": record(model, tokenizer, data, options.samples),
    }  # fmt: skip
    write_json(options.output, content)
    print(f"{options.output.name}: {', '.join(content['statistics'])}", file=sys.stderr)


def _arguments(options: argparse.Namespace) -> list[str]:
    # where the model lay on this machine is nothing that another one could use
    return [] if options.samples == 128 else ["--samples", str(options.samples)]


if __name__ == "__main__":
    main()
