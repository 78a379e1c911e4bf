"""Modules that hold one weight, as a model's tied embedding and head do: one S, which all of them compute with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from axolotl_spft.errors import SpftError, SpftFileError, listed
from axolotl_spft.tuner.called import CalledLayer
from axolotl_spft.tuner.layer import multiply
from axolotl_spft.tuner.mixed_batch import add_branches_, look_up_by_row_
from axolotl_spft.tuner.offloading import brought_in, execution_device, is_offloaded
from axolotl_spft.tuner.shared_input import SharedInput
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import spft_layers
from axolotl_spft.tuner.targets import renamed_targets

# the remedy where a base ties what was apart when the adapter was trained
_APART = (
    "load the model with `tie_word_embeddings: false`, or merge the adapter with `axolotl spft merge`, which unties it"
)


def no_longer_tied(names: Iterable[str], where: str) -> str:
    """What an error says of modules that were tied when an adapter was trained, and are not in the model ``where``."""
    return (
        f"{listed(names)} were one weight where the adapter was trained, with one delta, and are different weights in "
        f"{where}: load the base model that it was trained on, with `tie_word_embeddings: true`"
    )


class TiedLayer(nn.Module, CalledLayer):
    """A linear layer or an embedding that holds the W of another sparse layer, and computes with that one's S.

    It has no adapters of its own: they are chosen, merged, saved and deleted with the owner's.

    Args:
        base_layer: the module that is tied.
        owner: the sparse layer of the module that it is tied to; an `SpftEmbedding`.
    """

    adapter_layer_names = ()
    other_param_names = ()
    mixes_rows = True

    def __init__(self, base_layer: nn.Module, owner: SparseLayer):
        super().__init__()
        self.base_layer = base_layer
        # in a tuple, past torch's registration: the owner is a module of its own elsewhere in the model
        self._owners = (owner,)
        self._shared_input = SharedInput([self])
        owner.readers += (self,)

    @property
    def owner(self) -> SparseLayer:
        """The sparse layer that holds S."""
        return self._owners[0]

    @property
    def merged_adapters(self) -> list[str]:
        return self.owner.merged_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.owner.active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self.owner.disable_adapters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """The owner's are set."""

    def enable_adapters(self, enabled: bool) -> None:
        """The owner's are enabled."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The owner's are merged, into the weight that both hold."""

    def unmerge(self) -> None:
        """The owner's are unmerged."""

    def forget(self) -> None:
        """Forget what was worked out from the mask."""
        self._shared_input.forget()

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        base_layer, owner = self.base_layer, self.owner
        if adapter_names is not None and not owner.disable_adapters:
            owner.revert()
            with brought_in(base_layer) if is_offloaded(base_layer) else nullcontext():
                y = base_layer(x, *args, **kwargs)
            if isinstance(base_layer, nn.Embedding):
                return look_up_by_row_(y, x, owner, base_layer, adapter_names)
            return add_branches_(y, x, owner, adapter_names)
        names = owner.adapters_to_apply()
        if not names and not owner.reads_weight_again(x):
            return base_layer(x, *args, **kwargs)
        if isinstance(base_layer, nn.Embedding):
            return self.owner.look_up(x, base_layer, names)
        if not is_offloaded(base_layer):
            return multiply(x, base_layer, self.owner, names, self._shared_input)
        with brought_in(base_layer):
            return multiply(x.to(execution_device(base_layer)), base_layer, self.owner, names, self._shared_input)


def tied_modules(model: nn.Module) -> dict[nn.Module, dict[str, nn.Module]]:
    """For each module whose weight an embedding holds too, or that is one: all that hold it, by their names."""
    tied_to = {
        name.removesuffix(".weight"): source.removesuffix(".weight")
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
    }
    holders: dict[tuple, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            # on the meta device, where offloaded weights are, each module has its own
            place = ("name", tied_to.get(name, name)) if weight.is_meta else weight_place(weight)
            holders.setdefault(place, {})[name] = module
    return {
        module: group
        for group in holders.values()
        if len(group) > 1 and any(isinstance(each, nn.Embedding) for each in group.values())
        for module in group.values()
    }


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """By the name of each sparse layer whose S other modules compute with: the names of those."""
    name_of = {layer: name for name, layer in spft_layers(model).items()}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TiedLayer):
            found.setdefault(name_of[module.owner], []).append(name)
    return found


def check_ties(
    model: nn.Module, deltas: Iterable[str], recorded: Mapping[str, Sequence[str]] | None, adapter_name: str
) -> None:
    """Check that each delta of an adapter's file is of the modules that would compute with it here.

    Args:
        model: with the adapter's sparse layers.
        deltas: names of the modules that the file has a delta of.
        recorded: `tied_names` of the model that was trained, by the names of then; None in older files.

    Raises:
        SpftFileError: modules are tied here which were trained apart, or the other way round.
    """
    now = tied_names(model)
    readers = {name for others in now.values() for name in others}
    known = {name for name, _ in model.named_modules()}
    then = [
        {renamed_targets([name], model).pop() for name in (owner, *others)}
        for owner, others in (recorded or {}).items()
    ]
    for name in deltas:
        if name in readers:
            raise SpftFileError(
                f"adapter `{adapter_name}`: its file has a delta of {name} alone, which this model ties to another "
                f"module: {_APART}"
            )
        if recorded is None or name not in known:
            continue
        trained = next((group for group in then if name in group), {name}) & known
        here = {name, *now.get(name, ())}
        if trained - here:
            raise SpftFileError(f"adapter `{adapter_name}`: {no_longer_tied(trained, 'this model')}")
        if here - trained:
            raise SpftFileError(
                f"adapter `{adapter_name}`: it was trained where {name} was a weight of its own, and this model ties "
                f"it to {listed(here - trained)}: {_APART}"
            )


def refuse_to_part(name: str, excluded: Sequence[str]) -> None:
    """Raise where a module is targeted, and some that are tied to it are not to be trained as it is."""
    if excluded:
        raise SpftError(
            f"`target_modules` takes {name}, and `exclude_modules` or `modules_to_save` names {excluded[0]}, but the "
            "model ties the two: they are one weight, which one sparse delta trains in both places. Leave one of the "
            "names out, or load the model with `tie_word_embeddings: false`"
        )


def mark_shared_weights(model: nn.Module) -> None:
    """Tell each sparse layer whether a module uses its weight that does not compute with its S."""
    users: Counter[tuple[str, int]] = Counter()
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                users.update(
                    {weight_place(parameter) for parameter in child._parameters.values() if parameter is not None}
                )
    for layer in spft_layers(model).values():
        weight = layer.get_base_layer()._parameters.get(layer.parameter_name)
        layer.share_weight(weight is not None and users[weight_place(weight)] > 1 + len(layer.readers))


def weight_place(parameter: nn.Parameter) -> tuple[str, int]:
    """What parameters that are the same, or lie in the same memory, have in common."""
    # those on the meta device, and those that ZeRO-3 has partitioned, are nowhere
    return ("address", parameter.data_ptr()) if parameter.data_ptr() else ("id", id(parameter))
