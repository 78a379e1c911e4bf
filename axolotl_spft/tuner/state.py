"""The saved form of an adapter: validation before anything is changed, fingerprints."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from axolotl_spft.errors import SpftFileError, first_of
from axolotl_spft.ops.mask.csr import Mask, problems_of, slot_of
from axolotl_spft.tuner.originals import problems_of_originals
from axolotl_spft.tuner.sparse_layer import SparseLayer

TENSORS = ("spft_values", "spft_columns", "spft_row_offsets")
# of an adapter that repairs a quantized base
ORIGINALS = "spft_originals"


def spft_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of ``model`` by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def shapes_of(layers: Mapping[str, SparseLayer]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each layer."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def shapes_fingerprint(shapes: Iterable[tuple[str, int, int]]) -> str:
    """SHA-256 over the lines 'name out_features in_features'."""
    lines = "\n".join(f"{name} {out_features} {in_features}" for name, out_features, in_features in shapes)
    return hashlib.sha256(lines.encode()).hexdigest()


def base_shapes_of(layers: Mapping[str, SparseLayer]) -> str:
    """The fingerprint that the adapter's config records."""
    return shapes_fingerprint((name, layer.out_features, layer.in_features) for name, layer in layers.items())


def slots_of(layers: Mapping[str, SparseLayer], adapter_name: str) -> dict[str, tuple[int, str]]:
    """What each layer's values stand for: name -> (nnz, SHA-256 of the mask's columns and row offsets)."""
    return {
        name: slot_of(layer.mask(adapter_name)) for name, layer in layers.items() if adapter_name in layer.spft_values
    }


def mask_checksum(slots: Mapping[str, tuple[int, str]]) -> str:
    """SHA-256 over all slots of `slots_of`: equal for equal masks on the same modules."""
    lines = "\n".join(f"{name} {nnz} {digest}" for name, (nnz, digest) in slots.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def check_state(
    state_dict: Mapping[str, Tensor],
    layers: Mapping[str, SparseLayer],
    prefix: str,
    adapter_name: str,
    nnz: int | None,
    base_shapes: str | None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    renamed: bool = False,
    repaired: int | None = None,
) -> None:
    """Check all sparse tensors of one adapter in ``state_dict`` against the layers that shall take them.

    Args:
        state_dict: keys ``<prefix><layer>.spft_values.<adapter>`` and so on.
        layers: the sparse layers that hold the adapter, by name.
        nnz: how many values the adapter's config records, if it does.
        base_shapes: the fingerprint that the adapter's config records, if it does.
        shapes: (out_features, in_features) of each module that the file records, if it does: by the names of then.
        renamed: whether modules may have had other names then, which no fingerprint can be compared with.
        repaired: how many of the values begin at the unquantized weight, as the file records it, if it does.

    Raises:
        SpftFileError: with all problems; nothing has been changed.
    """
    endings = {f".{tensor}.{adapter_name}" for tensor in (*TENSORS, ORIGINALS)}
    given = {key for key in state_dict if key.startswith(prefix) and any(key.endswith(ending) for ending in endings)}
    problems, total, originals_found, known = [], 0, 0, set()
    for name, layer in layers.items():
        keys = [f"{prefix}{name}.{tensor}.{adapter_name}" for tensor in TENSORS]
        originals_key = f"{prefix}{name}.{ORIGINALS}.{adapter_name}"
        known.update((*keys, originals_key))
        absent = [tensor for tensor, key in zip(TENSORS, keys) if key not in state_dict]
        if absent:
            problems.append(f"{name}: {', '.join(absent)} missing")
            continue
        values, columns, row_offsets = (state_dict[key] for key in keys)
        found = problems_of(Mask(columns, row_offsets), values, layer.out_features, layer.in_features)
        if not found and originals_key in state_dict:
            found = problems_of_originals(state_dict[originals_key], values.numel())
            if layer.quantization_backend is not None and not layer.repairs:
                kind = layer.quantization_backend.backend_name
                found.append(f"it repairs a quantized weight, and the entries of a {kind} layer cannot be replaced")
            originals_found += values.numel()
        problems.extend(f"{name}: {problem}" for problem in found)
        total += values.numel()
    problems.extend(f"{key.removeprefix(prefix)}: the model has no such targeted module" for key in given - known)
    if not problems and nnz is not None and total != nnz:
        problems.append(
            f"{total} values in the file, but the adapter's config records nnz: {nnz} (if that is another adapter of "
            f"the same name, delete_adapter({adapter_name!r}) first)"
        )
    if not problems and repaired is not None and repaired != originals_found:
        problems.append(f"{originals_found} original weights in the file, but it records that {repaired} are repaired")
    if not problems and shapes is not None:
        problems = _problems_of_shapes(shapes, shapes_of(layers))
    elif not problems and base_shapes not in (None, base_shapes_of(layers)):
        if renamed:
            warnings.warn(
                f"adapter `{adapter_name}`: its file is an older one, and the model's modules were renamed since: "
                "whether their in_features are those of then cannot be checked",
                stacklevel=2,
            )
        else:
            problems = ["the targeted modules' names or shapes are not those that the adapter's config records"]
    if problems:
        raise SpftFileError(
            f"adapter `{adapter_name}`: its file is damaged or belongs to another base model: "
            f"{first_of(problems, '; ')}. Load it on the base model it was trained on, "
            "with an intact copy of the file"
        )


def _problems_of_shapes(recorded: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> list[str]:
    recorded = {name: tuple(shape) for name, shape in recorded.items()}
    if recorded.keys() == own.keys():
        return [
            f"{name}: trained on a weight of shape {recorded[name]}, but this model's has {tuple(own[name])}"
            for name in own
            if recorded[name] != tuple(own[name])
        ]
    # modules were renamed since: PEFT has found each one's tensors a place, and their shapes are left to compare
    if sorted(recorded.values()) != sorted(map(tuple, own.values())):
        return ["the targeted modules' shapes are not those that the file records"]
    return []
