"""What the salience pass of each metric costs beside that of `gradient`, with and without sample packing.

python -m integration.salience.pass_cost [--hidden-size 512] [--rounds 5] [fisher snip ...]

A Llama with random weights reads rows of 1,024 tokens: each one text, or eight texts that are packed. The passes of all
metrics take turns, and the shortest of each counts.
"""

from __future__ import annotations

import argparse
import time

import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_spft import SpftConfig, select_mask

TOKENS, TEXTS, VOCABULARY = 1024, 8, 1000


def make_base(hidden_size: int) -> LlamaForCausalLM:
    """A Llama of four layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": 4}
    heads = {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY, max_position_embeddings=TOKENS))


def make_batch(packed: bool) -> dict[str, torch.Tensor]:
    """One row: a text, or several whose positions begin anew."""
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    if packed:
        batch["position_ids"] = torch.arange(TOKENS // TEXTS).repeat(TEXTS)[None]
    return batch


def seconds(base: LlamaForCausalLM, metric: str, packed: bool) -> float:
    """The time that choosing a mask takes by a sample of two rows."""
    config = SpftConfig(density=0.005, salience=metric, samples=2 * (TEXTS if packed else 1))
    model = get_peft_model(base, config)
    begin = time.perf_counter()
    select_mask(model, [make_batch(packed)] * 2)
    passed = time.perf_counter() - begin
    model.unload()
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", default=["fisher"], help="metrics of the option `salience` (fisher)")
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 64; the larger, the longer (512)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the shortest counts (5)")
    options = parser.parse_args()
    metrics = list(dict.fromkeys(["gradient", *options.metrics]))
    base, found = make_base(options.hidden_size), {}
    turns = [(metric, packed) for _ in range(options.rounds) for packed in (False, True) for metric in metrics]
    for metric, packed in tqdm(turns, desc="Passes", unit="pass"):
        found.setdefault((metric, packed), []).append(seconds(base, metric, packed))
    for packed in (False, True):
        for metric in metrics:
            own, reference = min(found[metric, packed]), min(found["gradient", packed])
            kind = f"{TEXTS} texts packed in a row" if packed else "one text in a row"
            print(f"{metric}, {kind}: {own:.2f} s, {own / reference:.2f} x gradient")


if __name__ == "__main__":
    main()
