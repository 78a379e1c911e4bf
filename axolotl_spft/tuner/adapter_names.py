"""Names of adapters that PEFT would take for parts of the model when it writes the files of others."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from axolotl_spft.errors import SpftError

_BASE = ("base_layer", "original_module")


def check_adapter_names(names: Collection[str], model: nn.Module) -> None:
    """Check the names of several adapters of a model; a single one can be called anything.

    The file of one adapter lacks every key in which the name of another one stands between dots.

    Raises:
        SpftError: a module or parameter of the model has such a name, ``1`` or ``mlp`` say.
    """
    if len(names) < 2:
        return
    parts = _parts_of(model)
    for name in names:
        if name in parts:
            raise SpftError(
                f"adapter `{name}` is called as a part of the model, and PEFT would leave all that is called so out of "
                f"the other adapters' files: take another name, such as `adapter_name='{name}_adapter'`"
            )


def _parts_of(module: nn.Module) -> set[str]:
    """The names of the modules and parameters in a module, without those that stand for adapters."""
    holds_adapters = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    parts = {*module._parameters, *module._modules}
    for name, child in module._modules.items():
        if child is not None and (not holds_adapters or name in _BASE):
            parts |= _parts_of(child)
    return parts
