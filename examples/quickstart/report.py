"""Held-out loss of the base model, the base with its adapter, and the merged model of one Axolotl config.

The validation rows are tokenized and masked by Axolotl itself, so the loss is the one of training: the mean over
the output tokens of ``test_datasets``. The command fails unless the adapter lowers the base's loss by a tenth and
the merged model's loss equals the adapter's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MAX_RATIO = 0.9
MAX_MERGE_GAP = 1e-3
IGNORED = -100

Row = Mapping[str, Sequence[int]]


def held_out_rows(config: Path) -> list[Row]:
    """Read ``test_datasets`` through Axolotl: rows of input_ids and labels (-100: not counted)."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    # Axolotl starts a new debug.log in output_dir whenever a config is loaded: keep the one of the training run
    with tempfile.TemporaryDirectory() as log_dir:
        dataset = load_datasets(cfg=load_cfg(str(config), output_dir=log_dir)).eval_dataset
        if dataset is None:
            raise ValueError(f"{config}: `test_datasets` is missing: there is nothing held out to report on")
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset]


@torch.inference_mode()
def mean_token_loss(model: torch.nn.Module, rows: Sequence[Row], batch_size: int = 8) -> float:
    """Mean cross-entropy over all counted tokens of the rows, each token with the same weight."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        input_ids = _pad([row["input_ids"] for row in batch], 0)
        labels = _pad([row["labels"] for row in batch], IGNORED)
        attention_mask = _pad([[1] * len(row["input_ids"]) for row in batch], 0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        targets = labels[:, 1:]
        total += functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    return total / count


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer: AutoTokenizer, row: Row, max_new_tokens: int = 48) -> tuple[str, str]:
    """Return the prompt of a row as text, and the model's greedy answer to it."""
    prompt = [token for token, label in zip(row["input_ids"], row["labels"]) if label == IGNORED]
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(
        output[0, len(prompt) :], skip_special_tokens=True
    ).strip()


def load_model(path: Path) -> PreTrainedModel:
    """Load a plain causal language model in fp32.

    Raises:
        FileNotFoundError: if the directory holds no model.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no model: run the commands at the top of the config first")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_with_adapter(base: Path, adapter: Path) -> torch.nn.Module:
    """Load the base model with the trained adapter, through PEFT."""
    from peft import PeftModel

    import axolotl_spft.tuner  # noqa: F401  registers the method with PEFT

    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter: train it with this config first")
    return PeftModel.from_pretrained(load_model(base), adapter)


def failures(base: float, adapter: float, merged: float) -> list[str]:
    """The conditions that the three losses break, one sentence each."""
    broken = []
    if not adapter <= MAX_RATIO * base:
        broken.append(f"the adapter's loss {adapter:.4f} is above {MAX_RATIO} x the base's {base:.4f}")
    if not abs(merged - adapter) <= MAX_MERGE_GAP:
        broken.append(f"the merged model's loss {merged:.6f} is not the adapter's {adapter:.6f} (+- {MAX_MERGE_GAP})")
    return broken


def report(config: Path) -> list[str]:
    """Print the table and one example; return what is wrong."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    base_path, adapter_path = Path(settings["base_model"]), Path(settings["output_dir"])
    rows = held_out_rows(config)
    adapted = load_with_adapter(base_path, adapter_path)
    losses = {
        "base": mean_token_loss(load_model(base_path), rows),
        "base + adapter": mean_token_loss(adapted, rows),
        "merged": mean_token_loss(load_model(adapter_path / "merged"), rows),
    }
    prompt, text = answer(adapted, AutoTokenizer.from_pretrained(base_path), rows[0])
    print(f"\n{'model':<16}{'held-out loss':>14}{'of base':>10}")
    for name, loss in losses.items():
        print(f"{name:<16}{loss:>14.4f}{loss / losses['base']:>10.1%}")
    print(f"\n{prompt}\n-> {text}\n")
    return failures(*losses.values())


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the Axolotl config of the run, e.g. examples/quickstart/spft.yml")
    problems = report(parser.parse_args().config)
    if problems:
        raise SystemExit("quickstart failed: " + "; ".join(problems))
    print("quickstart passed")


if __name__ == "__main__":
    main()
