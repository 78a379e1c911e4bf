"""Runs an experiment of PEFT's comparison with ``spft`` and writes a result file of its format.

python -m integration.method_comparison integration/method_comparison/experiments/spft/NAME
python -m integration.method_comparison EXPERIMENT --data FOLDER --set model_id=FOLDER max_steps=20 eval_steps=10
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def run(experiment: Path, data: Path | None, output: Path, changes: dict[str, Any]) -> Path:
    """Carry out one experiment; returns the file written."""
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from axolotl_spft import SparseAdamW, select_mask, step_unit
    from axolotl_spft.files import atomic_path
    from integration.method_comparison.data import load_data
    from integration.method_comparison.protocol import batches, train
    from integration.method_comparison.result import result_of
    from integration.method_comparison.settings import read_settings

    created_at = dt.datetime.now(tz=dt.timezone.utc).replace(microsecond=0).isoformat()
    begun = time.perf_counter()
    settings = read_settings(experiment, changes)
    set_seed(settings["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(settings["model_id"])
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(
        settings["model_id"],
        dtype=getattr(torch, settings["dtype"]),
        device_map=device,
        attn_implementation=settings["attn_implementation"],
    )
    model = get_peft_model(base, PeftConfig.from_pretrained(str(experiment)))
    held = load_data(data)
    print(select_mask(model, batches(held.train, tokenizer, settings, device)))
    optimizers = {"SparseAdamW": SparseAdamW}
    make_optimizer = optimizers.get(settings["optimizer_type"]) or getattr(torch.optim, settings["optimizer_type"])
    unit = step_unit(model) if model.peft_config["default"].relative_step else 1.0
    trained = train(model, tokenizer, held, settings, make_optimizer, unit)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file_size = Path(folder, "adapter_model.safetensors").stat().st_size
    name = "/".join(experiment.resolve().parts[-2:])
    adapter = model.peft_config["default"].to_dict()
    result = result_of(trained, model, settings, adapter, name, created_at, time.perf_counter() - begun, file_size)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name.replace('/', '--')}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="a folder with adapter_config.json and training_params.json")
    parser.add_argument("--data", type=Path, help="folder with the data as JSON lines; the hub's data sets by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that the run changes")
    arguments = parser.parse_args()
    print(run(arguments.experiment, arguments.data, arguments.output, dict(_setting(each) for each in arguments.set)))


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
