"""Which modules can have a sparse delta."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

# subclasses of torch.nn.Linear whose own forward differs in its rounding only
_SAME_FORWARD = ("FalconLinear",)


def check_target(target: nn.Module, name: str, quantization: dict) -> None:
    """Check that a module can have a sparse delta.

    Args:
        target: the module.
        name: of it in the model.
        quantization: what PEFT's `resolve_quantization_backend` is given beside the module.

    Raises:
        TypeError: it computes something else than y = x W^T + b, or its W cannot be read.
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
    if backend is not None or not _multiplies_by_its_weight(target):
        raise TypeError(
            f"Target module `{name}` is a {kind}, which is not supported: target torch.nn.Linear, transformers' Conv1D "
            "or a quantized linear layer, without a forward of its own, or name it in `exclude_modules`"
        )
    weight = target._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        found = "a parametrized one" if weight is None else f"of {weight.dtype}"
        raise TypeError(
            f"Target module `{name}` needs a weight of 16 bits or more that is a parameter itself, but its is {found}: "
            "remove the parametrization, load the model in bf16, or name the module in `exclude_modules`"
        )


def _multiplies_by_its_weight(module: nn.Module) -> bool:
    """Whether y = x W^T + b is all that the module computes."""
    kind = type(module)
    # of the class, not of the module, around which accelerate may have put hooks
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _SAME_FORWARD
