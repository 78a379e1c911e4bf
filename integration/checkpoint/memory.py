"""The peak memory of a merge against the number of files of the base: it must not grow.

    python -m integration.checkpoint.memory FOLDER [--gib 2 8 30]

Each base has the tensors of a Llama in files of about one GiB of bf16, with zeros that take no room on the disk, as the
files have holes. A merged model has none, is written whole, and is deleted before the next. Every merge is a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

# a file holds 3 layers of 320 MiB in bf16, the largest tensor of which takes 64
_WIDTH, _LAYERS_A_FILE = 4096, 3
_PER_LAYER = {
    "self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.o_proj": 1, "mlp.gate_proj": 2,
    "mlp.up_proj": 2, "mlp.down_proj": 2,
}  # fmt: skip
_LIMIT_MIB = 64


def make_base(folder: Path, files: int) -> None:
    """A checkpoint of ``files`` files with a GiB of zeros in each, and its config and index."""
    folder.mkdir(parents=True)
    layers, weight_map = files * _LAYERS_A_FILE, {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        tensors = _layers(range(number * _LAYERS_A_FILE, (number + 1) * _LAYERS_A_FILE))
        if number == 0:
            tensors |= {"model.embed_tokens.weight": [64, _WIDTH], "lm_head.weight": [64, _WIDTH]}
            tensors |= {"model.norm.weight": [_WIDTH]}
        _write_zeros(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _WIDTH, "vocab_size": 64,
        "intermediate_size": 2 * _WIDTH, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _layers(numbers: range) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        for module, share in _PER_LAYER.items():
            shape = [_WIDTH, share * _WIDTH] if module == "mlp.down_proj" else [share * _WIDTH, _WIDTH]
            found[f"model.layers.{number}.{module}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{number}.{norm}.weight"] = [_WIDTH]
    return found


def _write_zeros(path: Path, tensors: dict[str, list[int]]) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        length = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + offset)


def make_adapter(folder: Path, files: int) -> None:
    """Some values in two matrices of every layer; few, as an adapter's own size grows with the model."""
    import torch

    from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta, write_adapter
    from axolotl_spft.ops.mask.csr import mask_from_positions

    mask = mask_from_positions(torch.arange(0, _WIDTH * _WIDTH, 4001), _WIDTH, _WIDTH)
    delta = SavedDelta(torch.ones(mask.nnz), mask, (_WIDTH, _WIDTH))
    names = [f"model.layers.{i}.self_attn.{p}" for i in range(files * _LAYERS_A_FILE) for p in ("q_proj", "o_proj")]
    write_adapter(folder, SavedAdapter({"peft_type": "SPFT"}, dict.fromkeys(names, delta)))


def _merge_and_tell(folder: Path) -> None:
    """In a process of its own: merge, and print its peak resident size before and after, in MiB."""
    import torch
    import transformers  # noqa: F401 what is imported is no part of the merge

    from axolotl_spft.bench.memory import PeakMemory
    from axolotl_spft.checkpoint.merge import merge

    peak = PeakMemory(torch.device("cpu"), own_process=True)
    peak.reset()
    before = peak.peak_bytes() or 0
    merge(folder / "adapter", folder / "merged", folder / "base")
    print(json.dumps([before / 2**20, (peak.peak_bytes() or 0) / 2**20]))


def measure(folder: Path, gib: int) -> dict[str, Any]:
    """One row; what it wrote is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make_base(folder / "base", gib)
        make_adapter(folder / "adapter", gib)
        free_gib = shutil.disk_usage(folder).free / 2**30
        if free_gib < gib + 5:
            raise SystemExit(
                f"{folder} has room for {free_gib:.0f} GiB, but {gib} and some are needed: name fewer `--gib`"
            )
        started = time.monotonic()
        command = [sys.executable, "-m", "integration.checkpoint.memory", str(folder), "--merge"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        before, peak = json.loads(done.stdout.splitlines()[-1])
        seconds = time.monotonic() - started
        return {"files": gib, "before_mib": before, "peak_mib": peak, "seconds": seconds}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, on a disk with room for the largest merged model")
    parser.add_argument("--gib", type=int, nargs="+", default=[2, 8, 30], help="sizes of the bases, a file a GiB")
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        _merge_and_tell(options.folder)
        return
    if options.folder.exists():
        parser.error(f"{options.folder} is there: name a new folder, which is deleted at the end")
    rows = [measure(options.folder, gib) for gib in tqdm(options.gib, unit="merge")]
    print("| GiB, in as many files | before, MiB | peak, MiB | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['files']} | {row['before_mib']:.0f} | {row['peak_mib']:.0f} | {row['seconds']:.0f} |")
    grown = max(row["peak_mib"] for row in rows) - rows[0]["peak_mib"]
    if grown > _LIMIT_MIB:
        raise SystemExit(f"the peak grew by {grown:.0f} MiB")


if __name__ == "__main__":
    main()
