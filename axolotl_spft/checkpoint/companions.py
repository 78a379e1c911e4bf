"""What stands beside the weights of a model: config, tokenizer, chat template, generation config, code."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, read_json_object
from axolotl_spft.files import atomic_path

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def copy_companions(base: Path, adapter: Path, target: Path) -> list[str]:
    """Copy what stands beside the weights of ``base`` into ``target``; a tokenizer saved with the adapter is newer.

    Returns:
        the names of the files.
    """
    sources = {
        path.name: path
        for path in sorted(base.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith(".")
    }
    if (adapter / "tokenizer_config.json").is_file():
        sources = {name: path for name, path in sources.items() if name not in _TOKENIZER}
        sources |= {name: adapter / name for name in _TOKENIZER if (adapter / name).is_file()}
    # of the second readers would load an adapter
    for name in (CONFIG, CONFIG_FILE):
        sources.pop(name, None)
    for name, path in sources.items():
        with atomic_path(target / name) as temporary:
            shutil.copyfile(path, temporary)
    return list(sources)


def remove_stale(folder: Path, names: Collection[str]) -> None:
    """Remove what belonged to the weights of the model before, and would be read with those of the new one.

    Args:
        names: what the new one has beside its weights.
    """
    for name in {*_TOKENIZER, "generation_config.json", CONFIG_FILE}.difference(names):
        if (folder / name).is_file():
            (folder / name).unlink()


def merged_config(
    base: Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], untied: bool, heads: Collection[str]
) -> dict:
    """The ``config.json`` of a merged model: the base's, with what the adapter changed.

    Args:
        model: the model on the meta device.
        shapes: parameter name -> shape, of parameters that the adapter replaces or adds.
        untied: whether weights that were tied have become different ones.
        heads: names of added parameters that are no untied weights.
    """
    config = read_json_object(base / CONFIG, "copy the base model again")
    config = copy.deepcopy(config)
    rows = _rows_of_embeddings(model, shapes)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if rows is not None and "vocab_size" in part:
            part["vocab_size"] = rows
    if untied:
        for part in parts:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if heads:
        config["architectures"] = [type(model).__name__]
        labels = max((shapes[name][0] for name in heads if name.endswith(".weight")), default=None)
        if labels is not None:
            config["id2label"] = {str(each): f"LABEL_{each}" for each in range(labels)}
            config["label2id"] = {f"LABEL_{each}": each for each in range(labels)}
    return config


def _rows_of_embeddings(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    embeddings = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    return shapes.get(f"{name}.weight", (None,))[0]


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
