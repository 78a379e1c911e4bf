"""What training holds for the trained numbers, from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from axolotl_spft.bench.methods import Method
from axolotl_spft.tuner import SpftModel
from axolotl_spft.tuner.sparse_layer import SparseLayer


def footprint_bytes(method: Method) -> dict[str, int]:
    """Bytes of each part, each storage once; call it between backward and ``zero_grad``.

    ``values``: what trains. ``gradients``: theirs. ``optimizer_state``: moments, masters, steps. ``masks``: positions
    in their saved form. ``derived``: what the sparse layers work out from the mask. ``originals``: the base's own
    entries at the trained positions.
    """
    trained = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
    states = method.optimizer.state.values() if method.optimizer is not None else ()
    modules = list(method.model.modules())
    sparse = [module for module in modules if isinstance(module, SparseLayer)]
    parts: dict[str, Iterable[Tensor]] = {
        "values": trained,
        "gradients": (parameter.grad for parameter in trained if parameter.grad is not None),
        "optimizer_state": (value for state in states for value in state.values() if isinstance(value, Tensor)),
        "masks": _masks(modules, sparse),
        "originals": (tensor for each in modules if isinstance(each, SpftModel) for tensor in each._ahead.originals()),
        "derived": _derived(sparse),
    }
    seen: set[int] = set()
    return {name: sum(_new_bytes(tensor, seen) for tensor in tensors) for name, tensors in parts.items()}


def _masks(modules: list[nn.Module], sparse: list[SparseLayer]) -> Iterator[Tensor]:
    for layer in sparse:
        for name in layer.spft_columns:
            yield from layer.mask(name)
    for module in modules:
        # SHiRA's: a plain dict of the adapters' indices
        yield from getattr(module, "shira_indices", {}).values()


def _derived(sparse: list[SparseLayer]) -> Iterator[Tensor]:
    for layer in sparse:
        for delta, places, *_ in layer._deltas.values():
            yield from (*delta.mask, *places)
            yield from (part for part in delta.plan if isinstance(part, Tensor))


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if not storage.nbytes() or storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
