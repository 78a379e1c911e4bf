"""One row of the table: a model, what is done to its weights, and the losses."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.statistics import INPUT_SQUARES
from axolotl_spft.salience.sample_pass import collect_statistics
from integration.evidence.bases import base_folder, load_base, load_tokenizer
from integration.evidence.judge import batch_of, encode, mean_of_tokens
from integration.evidence.low_rank import weighted_low_rank
from integration.evidence.methods import PROJECTIONS
from integration.evidence.tasks import maths, question

LENGTH, BATCH = 160, 8
# what is done to the weights: the bits of the base, and options of SpftConfig or a rank
ROWS: Mapping[str, dict[str, Any]] = {
    "bf16": {"bits": 16},
    "NF4": {"bits": 4},
    "NF4, repair of 0.1%": {"bits": 4, "density": 0.001},
    "NF4, repair of 0.5%": {"bits": 4, "density": 0.005},
    "NF4, repair of 1%": {"bits": 4, "density": 0.01},
    "NF4, repair of as many as rank 4": {"bits": 4, "match_lora_rank": 4},
    "NF4, low rank 1": {"bits": 4, "rank": 1},
    "NF4, low rank 4": {"bits": 4, "rank": 4},
}


def measure(base: str, row: str, judged: int, samples: int, data: Path, bases: Path) -> dict[str, Any]:
    """``values`` that a row spends, their ``share`` of the entries, and ``task_loss`` and ``english_loss`` a token."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, options = base_folder(base, bases), dict(ROWS[row])
    tokenizer = load_tokenizer(folder)
    model, rank = load_base(folder, options.pop("bits"), torch.bfloat16, device), options.pop("rank", None)
    train, test = (
        [encode(tokenizer, each.prompt, each.answer, LENGTH) for each in maths(data, part)]
        for part in ("train", "test")
    )
    sample = random.Random(1).sample(train, samples)
    batches = [batch_of(sample[i : i + BATCH], tokenizer.pad_token_id, device) for i in range(0, samples, BATCH)]
    spent = entries = 0
    if options or rank:
        # a metric that needs no gradient: with the whole budget for repair nothing is left to it
        config = SpftConfig(**(options or {"density": 0.001}), target_modules=PROJECTIONS, samples=samples, repair=1.0,
                            repair_from=folder, salience="magnitude")  # fmt: skip
        model = get_peft_model(model, config)
        layers = adapted_layers(model)
        entries = sum(layer.out_features * layer.in_features for layer in layers.values())
        if rank:
            squares = collect_statistics(model, layers, {INPUT_SQUARES}, batches, None, samples, Ranks()).sums
            spent = sum(rank * (layer.out_features + layer.in_features) for layer in layers.values())
            model = _with_low_rank(load_base(folder, 16, torch.bfloat16, device), model, squares[INPUT_SQUARES], rank)
        else:
            spent = select_mask(model, batches).selected
    questions = json.loads((data / "ARC-Easy_test.json").read_text(encoding="utf-8"))
    english = [encode(tokenizer, "", question(each), LENGTH) for each in questions]
    model.eval()
    losses = {
        name: mean_of_tokens(model, tokenizer, random.Random(0).sample(rows, judged), half=False)
        for name, rows in (("task_loss", test), ("english_loss", english))
    }
    return {"values": spent, "share": spent / entries if entries else 0.0, **losses}


@torch.no_grad()
def _with_low_rank(plain: nn.Module, model: nn.Module, squares: Mapping[str, Tensor], rank: int) -> nn.Module:
    """``plain`` with Q(W) + the best approximation of rank r of (W - Q(W)) diag(rms x), times diag(rms x)^-1."""
    for name, layer in tqdm(adapted_layers(model).items(), desc="Low rank", unit="matrix"):
        base_layer, linear = layer.get_base_layer(), plain.get_submodule(name)
        quantized = resolve_quantization_backend(base_layer).get_base_weight(base_layer).float()
        up, down = weighted_low_rank(linear.weight.float() - quantized, squares[name].sqrt(), rank)
        linear.weight.copy_(quantized + up @ down)
    return plain
