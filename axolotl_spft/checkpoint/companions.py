"""What stands beside the weights of a model: config, tokenizer, chat template, generation config, code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, read_json_object
from axolotl_spft.checkpoint.generation import GENERATION_CONFIG
from axolotl_spft.checkpoint.run_config import CONFIG, with_changes
from axolotl_spft.checkpoint.tokenizer_files import PROCESSOR, TOKENIZER, padding_of, tokenizer_of
from axolotl_spft.files import copy_files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def copy_companions(base: Path, adapter: Path, target: Path) -> list[str]:
    """Copy what stands beside the weights of ``base`` into ``target``.

    A tokenizer saved with the adapter is newer and replaces the whole of the base's, chat template included; each file
    of a processor is replaced by one of its name alone.

    Returns:
        the names of the files.
    """
    sources = {
        path.name: path
        for path in sorted(base.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith(".")
    }
    newer = tokenizer_of(adapter)
    if newer:
        replaced = {*TOKENIZER, *newer}
        if "chat_template.jinja" in newer:
            # a processor takes the template under its former name first
            replaced.add("chat_template.json")
        sources = {name: path for name, path in sources.items() if name not in replaced} | newer
    # of the second readers would load an adapter
    for name in (CONFIG, CONFIG_FILE):
        sources.pop(name, None)
    copy_files(sources, target)
    return list(sources)


def remove_stale(folder: Path, names: Collection[str]) -> None:
    """Remove what belonged to the weights of the model before, and would be read with those of the new one.

    Args:
        names: what the new one has beside its weights.
    """
    for name in {*TOKENIZER, *PROCESSOR, GENERATION_CONFIG, CONFIG_FILE}.difference(names):
        if (folder / name).is_file():
            (folder / name).unlink()


def merged_config(
    base: Path,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    untied: bool,
    heads: Collection[str],
    tokenizer: Path,
    changes: Mapping[tuple[str, ...], Any] = {},
) -> dict:
    """The ``config.json`` of a merged model: the base's, with what the run and its adapter changed.

    Args:
        model: the model on the meta device, which has as many labels as were trained.
        shapes: parameter name -> shape, of parameters that the adapter replaces or adds.
        untied: whether weights that were tied have become different ones.
        heads: names of added parameters that are no untied weights.
        tokenizer: the folder of the merged model's tokenizer, whose padding a new head needs where the base has none.
        changes: of the run's `axolotl_spft.checkpoint.run_config.RunConfig`.
    """
    config = with_changes(read_json_object(base / CONFIG, "copy the base model again"), changes)
    text, rows = _text_part(config, model), _rows_of_embeddings(model, shapes)
    for part in (config, text):
        if rows is not None and (part is text or "vocab_size" in part):
            part["vocab_size"] = rows
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if heads:
        config["architectures"] = [type(model).__name__]
        padding = padding_of(tokenizer, model.config)
        if text.get("pad_token_id") is None and padding is not None:
            text["pad_token_id"] = padding
    if heads or model.config.num_labels != len(config.get("id2label") or PretrainedConfig().id2label):
        config["id2label"] = {str(number): label for number, label in model.config.id2label.items()}
        config["label2id"] = dict(model.config.label2id)
    return config


def _text_part(config: dict, model: nn.Module) -> dict:
    """The part of a config that is about the tokens, which may be all of it: others may have keys of the same names."""
    try:
        own = model.config.get_text_config()
    except ValueError:
        # of two languages, as an encoder and a decoder that were put together
        return config
    parts: list[tuple[dict, PretrainedConfig]] = [(config, model.config)]
    for part, its in parts:
        if its is own:
            return part
        inner = [(each, getattr(its, key, None)) for key, each in part.items() if isinstance(each, dict)]
        parts += [(each, found) for each, found in inner if isinstance(found, PretrainedConfig)]
    return config


def _rows_of_embeddings(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    embeddings = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    return shapes.get(f"{name}.weight", (None,))[0]
