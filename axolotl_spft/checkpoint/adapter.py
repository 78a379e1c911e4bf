"""A saved adapter as plain tensors: ``adapter_config.json`` and ``adapter_model.safetensors``, without any model.

Per targeted module the file holds a CSR matrix under ``base_model.model.<module>.spft_values``, ``.spft_columns`` and
``.spft_row_offsets``, beside them ``.spft_originals`` where a quantized base is repaired, everything else that was
trained (``modules_to_save``) under the name of its parameter, biases under ``base_model.spft_bias.`` and their name
with slashes for dots, and in ``base_model.spft_record`` a JSON object as bytes, which has the modules' shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from axolotl_spft.config import mask_option_names
from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.files import atomic_path, check_safetensors
from axolotl_spft.ops.mask.csr import Mask, problems_of
from axolotl_spft.peft_type import SPFT
from axolotl_spft.tuner.biases import FILE_PREFIX as BIASES
from axolotl_spft.tuner.originals import problems_of_originals
from axolotl_spft.tuner.record import FILE_KEY, read_record, record_to_tensor
from axolotl_spft.tuner.state import ORIGINALS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
UNDER_DELTA = ".base_layer."
_VALUES, _COLUMNS, _ROW_OFFSETS = "spft_values", "spft_columns", "spft_row_offsets"


@dataclass(frozen=True)
class SavedDelta:
    """A sparse S of one module: ``values`` (nnz), their ``mask``, and ``shape`` (out_features, in_features).

    ``originals`` (nnz) are what the weight was before it was quantized, where the adapter repairs that: the values are
    then added to these, not to the quantized weight.
    """

    values: Tensor
    mask: Mask
    shape: tuple[int, int]
    originals: Tensor | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter.

    Attributes:
        config: what ``adapter_config.json`` says.
        deltas: module name -> its delta, in the order of the modules in the model where the file tells it.
        others: parameter name -> tensor, for modules that are trained whole (``modules_to_save``), and what PEFT saves
            of the weights under deltas.
        record: what ``base_model.spft_record`` says, whose shapes are those of the deltas; empty for an adapter that
            was not read from a file, of which ``config`` tells where its mask is from.
        has_shapes: whether the shapes are known. If not, in_features are the least that hold the columns.
        biases: parameter name -> tensor, for the biases of ``bias: all``.
    """

    config: dict
    deltas: dict[str, SavedDelta]
    others: dict[str, Tensor] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    has_shapes: bool = True
    biases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Tensor]:
        """All that is trained whole, by the names of the parameters."""
        return {name: tensor for name, tensor in self.others.items() if UNDER_DELTA not in name} | self.biases

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """Weights under deltas, by the names of the parameters: embeddings may have grown, so PEFT saves theirs."""
        return {name.replace(UNDER_DELTA, "."): tensor for name, tensor in self.others.items() if UNDER_DELTA in name}

    @property
    def nnz(self) -> int:
        return sum(delta.mask.nnz for delta in self.deltas.values())

    @property
    def repaired(self) -> int:
        """How many values are added to what the weights were before they were quantized."""
        return sum(delta.mask.nnz for delta in self.deltas.values() if delta.originals is not None)

    @property
    def mask_source(self) -> dict:
        """Where the mask came from; empty where nothing tells it."""
        source = self.record.get("mask_source", self.config.get("mask_source"))
        return source if isinstance(source, dict) else {}


def read_adapter(folder: str | os.PathLike, shapes: Mapping[str, tuple[int, int]] | None = None) -> SavedAdapter:
    """Read and check a saved sparse adapter.

    Args:
        shapes: module name -> (out_features, in_features) of the base model, every module of the adapter among them;
            a file without shapes of its own needs them.

    Raises:
        SpftFileError: a file is missing or damaged, belongs to another kind of adapter, or does not fit ``shapes``.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    record = read_record(path)
    tensors.pop(FILE_KEY, None)
    biases = {
        key.removeprefix(BIASES).replace("/", "."): tensors.pop(key) for key in list(tensors) if key.startswith(BIASES)
    }
    recorded = {name: tuple(shape) for name, shape in record.get("shapes", {}).items()} or shapes
    strange = [key for key in tensors if not key.startswith(_PREFIX)]
    problems = [f"{key}: no tensor of a saved adapter has such a name" for key in strange]
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items() if key not in strange}
    tensors = _unwrapped(tensors)
    deltas: dict[str, SavedDelta] = {}
    for name in _module_names(tensors, recorded):
        parts = [tensors.pop(f"{name}.{part}", None) for part in (_VALUES, _COLUMNS, _ROW_OFFSETS)]
        absent = [part for part, tensor in zip((_VALUES, _COLUMNS, _ROW_OFFSETS), parts) if tensor is None]
        if absent:
            problems.append(f"{name}: {', '.join(absent)} missing")
            continue
        values, mask, originals = parts[0], Mask(*parts[1:]), tensors.pop(f"{name}.{ORIGINALS}", None)
        if (recorded is not None and name not in recorded) or (shapes is not None and name not in shapes):
            problems.append(f"{name}: the base model has no such module")
            continue
        shape = recorded[name] if recorded is not None else _least_shape(mask)
        if shapes is not None and tuple(shapes[name]) != shape:
            problems.append(f"{name}: {shape} in the adapter, {tuple(shapes[name])} in the base model")
        problems += [f"{name}: {problem}" for problem in problems_of(mask, values, *shape)]
        if originals is not None:
            problems += [f"{name}: {problem}" for problem in problems_of_originals(originals, values.numel())]
        deltas[name] = SavedDelta(values, mask, shape, originals)
    adapter = SavedAdapter(config, deltas, tensors, record, recorded is not None, biases)
    if not problems and not deltas:
        problems.append("it holds no sparse values")
    recorded_repair = adapter.mask_source.get("repaired", adapter.repaired)
    if not problems and recorded_repair != adapter.repaired:
        problems.append(f"{adapter.repaired} original weights, but it records that {recorded_repair} are repaired")
    if not problems and config.get("nnz") not in (None, adapter.nnz):
        problems.append(f"{adapter.nnz} values, but adapter_config.json records nnz: {config['nnz']}")
    if problems:
        raise SpftFileError(
            f"{path} is damaged or belongs to another base model: {first_of(problems, '; ')}. Take an intact copy of "
            "the file, with the base model that it was trained on"
        )
    return adapter


def read_config(folder: str | os.PathLike) -> dict:
    """``adapter_config.json`` of a saved sparse adapter.

    Raises:
        SpftFileError: it is missing, no JSON object, or that of another kind of adapter.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_json_object(path, "name the folder of a saved sparse adapter")
    if config.get("peft_type") != SPFT:
        raise SpftFileError(f"{path}: `peft_type: {config.get('peft_type')}` must be SPFT: name a sparse adapter")
    return config


def read_json_object(path: Path, remedy: str) -> dict:
    """The JSON object in a file.

    Raises:
        SpftFileError: there is none; ``remedy`` is the last part of the message.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpftFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise SpftFileError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise SpftFileError(f"{path} must hold a JSON object: {remedy}")
    return found


def write_adapter(folder: str | os.PathLike, adapter: SavedAdapter) -> None:
    """Write an adapter that PEFT loads. Both of its files appear complete or, on any error, neither.

    Raises:
        SpftFileError: it is none that `read_adapter` would read again, or cannot be written.
    """
    problems = [
        f"{name}: {problem}"
        for name, delta in adapter.deltas.items()
        for problem in problems_of(delta.mask, delta.values, *delta.shape)
    ]
    if problems:
        raise SpftFileError(f"{folder}: {first_of(problems, '; ')}: nothing was written")
    tensors = {_PREFIX + name: tensor for name, tensor in adapter.others.items()}
    tensors |= {BIASES + name.replace(".", "/"): tensor for name, tensor in adapter.biases.items()}
    for name, delta in adapter.deltas.items():
        for part, tensor in zip((_VALUES, _COLUMNS, _ROW_OFFSETS), (delta.values, *delta.mask)):
            tensors[f"{_PREFIX}{name}.{part}"] = tensor
        if delta.originals is not None:
            tensors[f"{_PREFIX}{name}.{ORIGINALS}"] = delta.originals
    options = {name: adapter.config[name] for name in mask_option_names() if name in adapter.config}
    record = {"mask_source": adapter.mask_source or None, "options": options, **adapter.record}
    if adapter.has_shapes:
        record["shapes"] = {name: list(delta.shape) for name, delta in adapter.deltas.items()}
    tensors[FILE_KEY] = record_to_tensor(record)
    write_files(folder, tensors, {**adapter.config, "nnz": adapter.nnz})


def write_files(folder: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping) -> None:
    """Write the two files of an adapter of any kind, complete or, on any error, neither.

    Raises:
        SpftFileError: they cannot be written.
    """
    folder, tensors = Path(folder), _apart(tensors)
    try:
        with atomic_path(folder / CONFIG_FILE) as config_path, atomic_path(folder / WEIGHTS_FILE) as weights_path:
            save_file(tensors, weights_path, metadata={"format": "pt"})
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise SpftFileError(
            f"the adapter in {folder} cannot be written ({error}): free some room there, or name another folder"
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, none in the memory of another."""
    seen, apart = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what PEFT saves of the insides of modules that are trained whole, beside the weights of theirs.

    It does so where embeddings have grown.
    """
    inside = (".modules_to_save.", ".original_module.")
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(part in key and key.replace(part, ".") in tensors for part in inside)
    }


def _module_names(tensors: Mapping[str, Tensor], shapes: Mapping | None) -> list[str]:
    """The modules with sparse tensors, in the order of ``shapes``, then of the file."""
    endings = tuple(f".{part}" for part in (_VALUES, _COLUMNS, _ROW_OFFSETS))
    found = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.endswith(endings))
    known = [name for name in shapes or () if name in found]
    return known + [name for name in found if name not in set(known)]


def _least_shape(mask: Mask) -> tuple[int, int]:
    """(out_features, in_features), where the file does not say how many columns there are."""
    least = 2**16 + 1 if mask.columns.dtype == torch.int32 else 1
    widest = int(mask.columns.to(torch.int64).max()) + 1 if mask.nnz else 0
    return max(mask.row_offsets.numel() - 1, 0), max(least, widest)
