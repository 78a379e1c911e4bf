"""A model on the meta device: names, classes and shapes of its modules, without any weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axolotl_spft.errors import SpftFileError, first_line
from axolotl_spft.ops.weight.stacked import shape_of
from axolotl_spft.tuner.expert_targets import stacked_parameters
from axolotl_spft.tuner.expert_weight import stores_transposed

_BY_TASK = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
_GENERAL = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")


def skeleton(
    folder: Path,
    modules: Collection[str] = (),
    task_type: str | None = None,
    trained: Mapping[str, tuple[int, ...]] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of the ``config.json`` in a folder, on the meta device.

    Args:
        modules: names that it must have; of the classes that the config can be loaded as, the first with all of them
            is taken.
        task_type: PEFT's, of the adapter.
        trained: parameter name -> shape, of parameters that were trained whole. They tell how many outputs a classifier
            has: it is made with the number that fits most of them, if its own does not.

    Raises:
        SpftFileError: the config cannot be read, or no class has these modules.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SpftFileError(f"{folder}: its config cannot be read ({first_line(error)})") from error
    missing, reason = list(modules), None
    for kind in _kinds(config, task_type):
        try:
            model = on_meta(getattr(transformers, kind), config, trust_remote_code)
        except (ValueError, AttributeError, ImportError) as error:
            reason = reason or first_line(error)
            continue
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        missing = [name for name in modules if name not in names]
        if not missing:
            return _with_labels(kind, config, model, trained or {}, trust_remote_code)
        reason = f"{type(model).__name__} has no module {missing[0]}"
    raise SpftFileError(f"{folder} is not the model that the adapter belongs to ({reason}): name that base model")


def _kinds(config: Any, task_type: str | None) -> list[str]:
    named = list(config.architectures or ())
    return list(
        dict.fromkeys([*([_BY_TASK[task_type]] if task_type in _BY_TASK else []), *_GENERAL[:1], *named, *_GENERAL])
    )


def _with_labels(
    kind: str, config: Any, model: nn.Module, trained: Mapping[str, tuple[int, ...]], trust_remote_code: bool
) -> nn.Module:
    """``model``, or one of its class with another number of labels where that fits more of the trained shapes."""
    import transformers

    best, wrong = model, _misfits(model, trained)
    for labels in dict.fromkeys(trained[name][0] for name in wrong):
        other = copy.deepcopy(config)
        other.num_labels = labels
        made = on_meta(getattr(transformers, kind), other, trust_remote_code)
        if len(found := _misfits(made, trained)) < len(wrong):
            best, wrong = made, found
    return best


def _misfits(model: nn.Module, trained: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Those of the trained parameters that have another shape in the model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [name for name, shape in trained.items() if shape and shapes.get(name, shape) != shape]


def on_meta(kind: Any, config: Any, trust_remote_code: bool) -> nn.Module:
    """A model of a class, or of the one that an auto class has for the config, without weights."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            if kind.__name__.startswith("Auto"):
                return kind.from_config(config, trust_remote_code=trust_remote_code)
            return kind(config)
    finally:
        logger.setLevel(level)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear module, in the order of the modules."""
    from transformers.pytorch_utils import Conv1D

    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


def module_shapes(model: nn.Module, modules: Collection[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of some modules, in the model's order; of stacked experts (experts x out, in)."""
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name in modules}
    for name, module in model.named_modules():
        if name in modules and isinstance(module, nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    for found in stacked_parameters(model):
        if found.name in modules:
            weight = found.module.get_parameter(found.parameter_name)
            shapes[found.name] = shape_of(weight, stores_transposed(found.module))
    return shapes
