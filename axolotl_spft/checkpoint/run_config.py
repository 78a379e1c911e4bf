"""What a run changed of its base's ``config.json``: Axolotl leaves the config of its model beside the adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, read_json_object
from axolotl_spft.checkpoint.skeleton import on_meta
from axolotl_spft.checkpoint.tokenizer_files import padding_of, tokenizer_of

CONFIG = "config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# how weights are stored, used and labelled, and how many rows an embedding has: the base's, or the merge's own
_NOT_OF_A_RUN = (
    "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
)  # fmt: skip


class RunConfig(NamedTuple):
    """What a run changed.

    Attributes:
        changes: the names of a key, that of the part of the config before its own -> the value that the run had.
        model: the model of the changed config, on the meta device.
        of_another_model: the file that was found and not read, because it is that of another model.
    """

    changes: Mapping[tuple[str, ...], Any]
    model: nn.Module
    of_another_model: Path | None = None

    def summary(self) -> dict[str, Any]:
        """For a report in JSON."""
        other = self.of_another_model
        names = sorted(".".join(names) for names in self.changes)
        return {"changed": names, "of_another_model": None if other is None else str(other)}


def config_of_run(adapter_folder: Path, base: Path, model: nn.Module) -> RunConfig:
    """What the run of a saved adapter changed; nothing where no config lies beside it.

    Args:
        base: the folder of the base model.
        model: that model on the meta device.
    """
    path = _path_of(adapter_folder)
    if path is None:
        return RunConfig({}, model)
    kind = type(model.config)
    try:
        of_base, of_run = (read_json_object(each, "copy it again") for each in (base / CONFIG, path))
        if of_run.get("model_type") != of_base.get("model_type"):
            raise ValueError("another kind of model")
        own = kind.from_dict(of_run)
        changes = _differences(own.to_dict(), kind.from_dict(of_base).to_dict())
        changes |= _padding(adapter_folder, own)
        # a new token may be beyond the embedding of the base
        of_shapes = {names: value for names, value in changes.items() if names[-1] not in TOKENS}
        made = _made_with(of_shapes, model) if of_shapes else model
    except Exception:
        return RunConfig({}, model, path)
    return RunConfig(changes, made) if _fits(made, model) else RunConfig({}, model, path)


def with_changes(config: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A config with what a run changed.

    A part that the config does not have is the whole: older files have all of its keys there.
    """
    found = copy.deepcopy(dict(config))
    for names, value in changes.items():
        part = found
        for name in names[:-1]:
            part = part[name] if isinstance(part.get(name), dict) else part
        part[names[-1]] = copy.deepcopy(value)
        if names[-1] == "rope_parameters":
            _tell_older_readers(part, value)
    return found


def _tell_older_readers(part: dict[str, Any], rope: Any) -> None:
    """Change the keys that stood for ``rope_parameters`` too, which count before it, where a config has them."""
    for name in {"rope_theta", "rope_scaling"} & part.keys():
        if "rope_type" not in rope:
            # of several kinds of layers
            del part[name]
        elif name == "rope_theta":
            part[name] = rope.get("rope_theta")
        else:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            part[name] = None if rope["rope_type"] == "default" else scaling


def _path_of(adapter_folder: Path) -> Path | None:
    """The config beside an adapter; that of its run beside one of the run's checkpoints."""
    folders = [adapter_folder]
    run = adapter_folder.absolute().parent
    if re.fullmatch(r"checkpoint-\d+", adapter_folder.name) and (run / CONFIG_FILE).is_file():
        folders.append(run)
    return next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)


def _differences(run: Mapping[str, Any], base: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for name, value in run.items():
        other = base.get(name)
        if name in _NOT_OF_A_RUN or name.startswith("_"):
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping) and "model_type" in value:
            found |= {(name, *names): each for names, each in _differences(value, other).items()}
        elif value != other:
            found[(name,)] = value
    return found


def _padding(adapter_folder: Path, config: PretrainedConfig) -> dict[tuple[str, ...], Any]:
    """The padding token, which trainers give to the model after Axolotl has written its config."""
    if not tokenizer_of(adapter_folder):
        return {}
    try:
        text = config.get_text_config()
    except ValueError:
        # of two languages, as an encoder and a decoder that were put together
        text = config
    padding = padding_of(adapter_folder, config)
    if padding is None or padding == getattr(text, "pad_token_id", None):
        return {}
    part = tuple(name for name, value in vars(config).items() if value is text)
    return {(*part, "pad_token_id"): padding}


def _made_with(changes: Mapping[tuple[str, ...], Any], model: nn.Module) -> nn.Module:
    config = type(model.config).from_dict(with_changes(model.config.to_dict(), changes))
    # the class is there already, with whatever code it is of
    return on_meta(type(model), config, trust_remote_code=False)


def _fits(made: nn.Module, model: nn.Module) -> bool:
    """Whether a model has no parameter that the other has not, or in another shape."""
    one, other = (
        {name: tuple(parameter.shape) for name, parameter in each.named_parameters(remove_duplicate=False)}
        for each in (made, model)
    )
    return one.items() <= other.items()
