"""Which modules can have a sparse delta."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.expert_targets import problem_of_parameter, warn_of_untrained_experts

# subclasses of torch.nn.Linear whose own forward differs in its rounding only
_SAME_FORWARD = ("FalconLinear",)


def check_is_peft_model(model: nn.Module) -> None:
    """Check that a model is one of `peft.get_peft_model`.

    Raises:
        SpftError: it is not.
    """
    if isinstance(model, (PeftModel, PeftMixedModel)):
        return
    injected = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    how = ", which add_adapter() or inject_adapter_in_model() has put sparse layers into," if injected else ""
    raise SpftError(
        f"select_mask needs a PeftModel, but was given a {type(model).__name__}{how} where nothing records, saves or "
        "loads a mask: give the base model without adapters to `peft.get_peft_model(model, SpftConfig(...))`, and its "
        "result to select_mask"
    )


def check_target(target: nn.Module, name: str, quantization: dict) -> None:
    """Check that a module can have a sparse delta.

    Args:
        target: the module.
        name: of it in the model.
        quantization: what PEFT's `resolve_quantization_backend` is given beside the module.

    Raises:
        TypeError: it computes something else than y = x W^T + b or y = W[ids], or its W cannot be read.
    """
    kind = type(target).__name__
    if isinstance(target, BaseTunerLayer):
        raise TypeError(
            f"Target module `{name}` is adapted by a {type(target).__module__}.{kind} already: merge that adapter "
            "first (merge_and_unload()), or name the module in `exclude_modules`"
        )
    backend = resolve_quantization_backend(target, **quantization)
    if backend is not None and backend.layer_type == "linear":
        return
    if backend is not None or not (_multiplies_by_its_weight(target) or _looks_up_its_weight(target)):
        raise TypeError(
            f"Target module `{name}` is a {kind}, which is not supported: target torch.nn.Linear, transformers' "
            "Conv1D, torch.nn.Embedding or a quantized linear layer, without a forward of its own, or name it in "
            "`exclude_modules`"
        )
    if getattr(target, "max_norm", None) is not None:
        raise TypeError(
            f"Target module `{name}` has `max_norm: {target.max_norm}`, by which its forward pass changes the frozen "
            "weight: set `max_norm = None` on it, or name the module in `exclude_modules`"
        )
    weight = target._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        found = "a parametrized one" if weight is None else f"of {weight.dtype}"
        raise TypeError(
            f"Target module `{name}` needs a weight of 16 bits or more that is a parameter itself, but its is {found}: "
            "remove the parametrization, load the model in bf16, or name the module in `exclude_modules`"
        )


def problem_of_fused_experts(name: str, model: nn.Module, is_pattern: bool = False) -> str | None:
    """What to say of a name in ``target_modules`` that is no module's, but that of experts in one 3-D parameter.

    Args:
        is_pattern: whether it is a regular expression of whole names.
    """

    def is_meant(full_name: str) -> bool:
        return bool(re.fullmatch(name, full_name)) if is_pattern else f".{full_name}".endswith(f".{name}")

    if any(is_meant(module) for module, _ in model.named_modules()):
        return None
    for full_name, parameter in model.named_parameters():
        if is_meant(full_name) and parameter.ndim == 3:
            kind = type(model.get_submodule(full_name.rpartition(".")[0])).__name__
            return (
                f"`target_modules: {name}` matches no module of the {type(model).__name__}: {full_name} is one "
                f"parameter of three dimensions, {tuple(parameter.shape)}, which holds all experts of a {kind}: name "
                f"it in `target_parameters: [{'.'.join(full_name.split('.')[-2:])}]` instead (`target_modules: "
                "all-linear` takes every linear layer, the shared experts among them)"
            )
    return None


def settle_targets(config: Any, model: nn.Module) -> None:
    """Give the targets of a saved adapter's config the names of now, and check those of any config.

    It is said which experts ``all-linear`` leaves untrained.

    Args:
        config: an `SpftConfig` of the model's own.

    Raises:
        SpftError: names mean experts in another way than the option that has them, or no parameter.
    """
    if isinstance(config.target_modules, str):
        problems = [problem_of_fused_experts(config.target_modules, model, is_pattern=True)]
    else:
        if config.is_saved:
            config.target_modules = renamed_targets(config.target_modules, model)
        problems = [problem_of_fused_experts(name, model) for name in config.target_modules]
    if config.is_saved and config.target_parameters:
        config.target_parameters = sorted(renamed_targets(config.target_parameters, model))
    problems += [problem_of_parameter(name, model) for name in config.target_parameters or ()]
    if any(problems):
        raise SpftError("; ".join(filter(None, problems)))
    if config.target_modules == "all-linear" and not config.target_parameters and Ranks.current().rank == 0:
        warn_of_untrained_experts(model)


def renamed_targets(names: Iterable[str], model: nn.Module) -> set[str]:
    """The target modules or parameters that a saved adapter's config lists, by their names in the model now.

    PEFT renames the tensors of a file as the model's ``_checkpoint_conversion_mapping`` says (the first regular
    expression that matches), but not the targets.
    """
    renames: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    modules = [f".{name}" for name, _ in model.named_modules()]
    modules += [f".{name}" for name, _ in model.named_parameters()]
    renamed = set()
    for name in names:
        now = name = name.removeprefix(".")
        if not any(module.endswith(f".{name}") for module in modules):
            each = (re.subn(pattern, text, name) for pattern, text in renames.items())
            now = next((new for new, count in each if count), name)
        renamed.add(now)
    return renamed


def _multiplies_by_its_weight(module: nn.Module) -> bool:
    """Whether y = x W^T + b is all that the module computes."""
    kind = type(module)
    # of the class, not of the module, around which accelerate may have put hooks
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _SAME_FORWARD


def _looks_up_its_weight(module: nn.Module) -> bool:
    """Whether y = W[ids], or that times ``embed_scale``, is all that the module computes."""
    kind = type(module)
    scaled = issubclass(kind, nn.Embedding) and kind.__name__.endswith("ScaledWordEmbedding")
    return kind.forward is nn.Embedding.forward or (scaled and hasattr(module, "embed_scale"))


def whole_names(targets: Iterable[str] | str, holders: Iterable[str], model: nn.Module) -> set[str] | str:
    """The targets that a config records, where embeddings or heads are among them by their whole names.

    Where PEFT finds ``embed_tokens`` or ``lm_head`` among the targets, it saves the module's whole weight beside the
    adapter, and a frozen weight need not be saved. A whole name without a dot gets one before it.

    Args:
        targets: ``target_modules``.
        holders: names of the modules that hold the adapter.
    """
    if isinstance(targets, str):
        embeddings = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        if not any(re.fullmatch(targets, name) for name in embeddings):
            return targets
        kept = set()
    else:
        kept = {name for name in targets if name not in EMBEDDING_LAYER_NAMES}
        if len(kept) == len(set(targets)):
            return targets
    others = [name for name in holders if not any(f".{name}".endswith(f".{target}") for target in kept)]
    return kept | {name if "." in name else f".{name}" for name in others}
