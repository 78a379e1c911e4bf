"""Merging a saved adapter into a base checkpoint, file by file: no weights of a model are loaded as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter, read_adapter, read_config
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.companions import CONFIG, copy_companions, merged_config
from axolotl_spft.checkpoint.exactness import total
from axolotl_spft.checkpoint.generation import give_tokens
from axolotl_spft.checkpoint.merged_weights import MergedWeights
from axolotl_spft.checkpoint.output import MARK, MergeOutput
from axolotl_spft.checkpoint.quantized import Quantizer
from axolotl_spft.checkpoint.revision import find_base
from axolotl_spft.checkpoint.run_config import RunConfig, config_of_run
from axolotl_spft.checkpoint.shard_writer import is_written, write_shard
from axolotl_spft.checkpoint.shards import INDEX_FILE, NAMES, Shards, size_bytes
from axolotl_spft.checkpoint.skeleton import module_shapes, skeleton
from axolotl_spft.checkpoint.trained_base import choose_onto, trained_base
from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import count_entries, write_json
from axolotl_spft.tuner.state import ORIGINALS

_THREADS, _PIECE_BYTES, _PIECES = 4, 4096, 64


def merge(
    adapter_folder: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    onto: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the merged model; what a killed run has finished is not written again.

    Args:
        adapter_folder: a saved sparse adapter.
        output: the folder of the merged model. An earlier merge there stays as it is until the new one is complete.
        base: the unquantized base model, a folder or a name of the hub; by default the one that the adapter records.
        onto: ``base``: W + S, in the dtype of the base. ``quantized``: Q(W) + S, what training on a quantized base
            computed with, stored in the dtype of the base. By default ``quantized`` where the base of the training was.
        quantization: settings of the ``BitsAndBytesConfig`` that the base had in training, empty for none; by default
            those that the adapter records.
        dtype: that a base that was quantized was loaded in; see `trained_base`.
        revision: of a base on the hub; see `find_base`.
        overwrite: whether the merged model may replace another one in ``output``, which is no earlier merge.

    Returns:
        what was written, and how exact it is.

    Raises:
        SpftFileError: anything does not fit, or cannot be written, or another model is in ``output``.
    """
    adapter_folder, target = Path(adapter_folder), MergeOutput(Path(output), overwrite)
    config = read_config(adapter_folder)
    base_name = base or config.get("base_model_name_or_path")
    if not base_name:
        raise SpftFileError(f"{adapter_folder / CONFIG_FILE} does not say its base model: add `--base`")
    target.check({"base model": Path(base_name).expanduser(), "adapter": adapter_folder})
    trained = trained_base(adapter_folder, quantization, dtype)
    quantization, dtype = trained.quantization, trained.dtype
    repairs = count_entries(adapter_folder / WEIGHTS_FILE, f".{ORIGINALS}") > 0
    onto = choose_onto(onto, trained, repairs, adapter_folder)
    found_base = find_base(adapter_folder, base_name, revision)
    base_folder = found_base.folder
    target.check({"base model": base_folder})
    adapter, model = read_for(adapter_folder, base_folder, trust_remote_code)
    of_run = config_of_run(adapter_folder, base_folder, model)
    model = of_run.model
    checkpoint = BaseCheckpoint(base_folder, model)
    quantizer = Quantizer(quantization, model, dtype) if quantization else None
    merged = MergedWeights(checkpoint, adapter, quantizer, onto == "quantized")
    mark = {MARK: _fingerprint(adapter_folder, checkpoint.shards, onto, quantization, dtype, of_run)}
    written = _write_files(checkpoint.shards, merged, target, mark)
    _finish(checkpoint, merged, adapter, of_run, adapter_folder, target)
    exactness = merged.exactness
    return {
        "output": str(output),
        "adapter": str(adapter_folder),
        "base": found_base.summary(),
        "config_of_run": of_run.summary(),
        "onto": onto,
        "files": list(checkpoint.shards.headers),
        "files_written": written,
        "matrices": len(adapter.deltas),
        "matrices_measured": len(exactness),
        "trained_on_quantized": bool(quantization),
        "trained_on": trained.summary(),
        "repaired": adapter.repaired,
        **total(exactness).summary(),
    }


def read_for(
    adapter_folder: Path, base_folder: Path, trust_remote_code: bool = False
) -> tuple[SavedAdapter, torch.nn.Module]:
    """An adapter with its shapes, and the model of its base on the meta device."""
    adapter = read_adapter(adapter_folder)
    trained = {name: tuple(tensor.shape) for name, tensor in adapter.whole.items()}
    model = skeleton(base_folder, adapter.deltas, adapter.config.get("task_type"), trained, trust_remote_code)
    if not adapter.has_shapes:
        adapter = read_adapter(adapter_folder, module_shapes(model, adapter.deltas))
    return adapter, model


def _write_files(shards: Shards, merged: MergedWeights, output: MergeOutput, mark: Mapping[str, str]) -> list[str]:
    """Write every file that is not there yet; the names of those."""
    written = []
    total_bytes = sum(
        entry.stop - entry.start for header in shards.headers.values() for entry in header.entries.values()
    )
    last = list(shards.headers)[-1]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=total_bytes, desc="Merging", unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        for name, header in shards.headers.items():
            own_bytes = sum(entry.stop - entry.start for entry in header.entries.values())
            if is_written(output.staging / name, mark) or is_written(output.folder / name, mark):
                bar.update(own_bytes)
                continue
            changed = {key: found for key in header.entries if (found := merged.changed(key)) is not None}
            new = {key: (NAMES[dtype], shape) for key, (dtype, shape) in changed.items()}
            if name == last:
                new |= {key: (NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in merged.additional.items()}
            metadata = {"format": "pt", **header.metadata, **mark}
            write_shard(
                output.staging / name,
                shards.folder / name,
                header.entries,
                new,
                merged.make,
                metadata,
                pool,
                bar.update,
            )
            written.append(name)
    return written


def _finish(
    checkpoint: BaseCheckpoint,
    merged: MergedWeights,
    adapter: SavedAdapter,
    of_run: RunConfig,
    adapter_folder: Path,
    output: MergeOutput,
) -> None:
    """Put everything in its place; from here on nothing needs room on the disk."""
    staging, shards = output.staging, checkpoint.shards
    try:
        names = copy_companions(shards.folder, adapter_folder, staging)
        given = adapter.embeddings | adapter.whole | merged.additional
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        config = merged_config(shards.folder, of_run.model, shapes, merged.unties, merged.new, staging, of_run.changes)
        give_tokens(staging, of_run.changes)
        write_json(staging / CONFIG, config)
        if shards.has_index:
            write_json(staging / INDEX_FILE, _index(shards, merged))
    except OSError as error:
        raise SpftFileError(
            f"{staging} cannot be written ({error.strerror or error}): what was in {output.folder} is as it was"
        ) from error
    weights = [*shards.headers, *([INDEX_FILE] if shards.has_index else [])]
    output.put_in_place(weights, [*names, CONFIG])


def _index(shards: Shards, merged: MergedWeights) -> dict:
    last = list(shards.headers)[-1]
    weight_map = dict(shards.file_of) | dict.fromkeys(merged.additional, last)
    total_size = sum(
        size_bytes(*(merged.changed(key) or (shards.dtype(key), shards.shape(key)))) for key in shards.file_of
    ) + sum(tensor.nbytes for tensor in merged.additional.values())
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def _fingerprint(
    adapter_folder: Path,
    shards: Shards,
    onto: str,
    quantization: Mapping,
    dtype: torch.dtype | None,
    of_run: RunConfig,
) -> str:
    """SHA-256 over all that a merge depends on; of the base, the headers and samples of the data."""
    settings = sorted((key, str(value)) for key, value in quantization.items())
    digest = hashlib.sha256(json.dumps([1, onto, str(dtype), settings]).encode())
    if of_run.changes:
        # what is tied may be among them
        digest.update(repr(sorted(of_run.changes.items())).encode())
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (adapter_folder / name).open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    for name, header in shards.headers.items():
        digest.update(json.dumps([name, [[key, vars(entry)] for key, entry in header.entries.items()]]).encode())
        path = shards.folder / name
        size = path.stat().st_size
        with path.open("rb") as file:
            for part in range(_PIECES + 1):
                file.seek(max(0, (size - _PIECE_BYTES) * part // _PIECES))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
