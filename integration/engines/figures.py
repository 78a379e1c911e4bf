"""What a run under an engine left behind: losses, values, mask, bytes of optimizer state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = ("master", "single_partition_of_fp32_groups", "fp32_flat_groups")


class Figures(NamedTuple):
    """Of one checkpoint.

    Attributes:
        losses: of every step.
        values: all trained values, module by module, in float64.
        mask: SHA-256 of all positions.
        moment_bytes, master_bytes: of the optimizer state, over all files of the checkpoint.
    """

    losses: list[float]
    values: torch.Tensor
    mask: str
    moment_bytes: int
    master_bytes: int


def losses(output_dir: Path, step: int) -> list[float]:
    """The training losses that the checkpoint at ``step`` recorded."""
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def figures_of(output_dir: Path, step: int) -> Figures:
    """The figures of the checkpoint at ``step``."""
    checkpoint = output_dir / f"checkpoint-{step}"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for key in sorted(adapter):
        if not key.endswith("spft_values"):
            digest.update(key.encode() + adapter[key].to(torch.int64).numpy().tobytes())
    values = [adapter[key].double() for key in sorted(adapter) if key.endswith("spft_values")]
    tensors = [each for path in optimizer_files(checkpoint) for each in _tensors(_load(path))]
    return Figures(
        losses(output_dir, step),
        torch.cat(values),
        digest.hexdigest(),
        sum(_bytes(tensor) for names, tensor in tensors if any(name.startswith(MOMENTS) for name in names)),
        sum(_bytes(tensor) for names, tensor in tensors if any(name in _MASTERS for name in names)),
    )


def optimizer_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's optimizer state: one, or under DeepSpeed one for each rank."""
    return sorted(checkpoint.glob("global_step*/*optim_states.pt")) or [checkpoint / "optimizer.pt"]


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same adapter and the same optimizer state, bit for bit."""
    adapters = [load_file(path / "adapter_model.safetensors") for path in (one, other)]
    files = list(zip(optimizer_files(one), optimizer_files(other), strict=True))
    states = [[_state_of(path, rank) for rank, path in enumerate(paths)] for paths in zip(*files)]
    return all(_same_bits(a, b) for a, b in zip(*([adapter, *state] for adapter, state in zip(adapters, states))))


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((one - other).abs().max() / other.abs().max()).item()


def _state_of(path: Path, rank: int) -> dict[str, torch.Tensor]:
    """Every tensor of a rank's optimizer file by name; of ZeRO-3's flat ones the entries that stand for values."""
    state = dict(_named(_load(path)))
    models = sorted(path.parent.glob("zero_pp_rank_*_model_states.pt"))
    if not models:
        return state
    # what fills a parameter's last part up is memory that nobody has written
    world, real = len(models), []
    for shapes in _load(models[rank])["param_shapes"]:
        for shape in shapes.values():
            part = -(-shape.numel() // world)
            real.append(torch.arange(rank * part, (rank + 1) * part) < shape.numel())
    filled = torch.cat(real)
    return {name: tensor[filled] if tensor.shape == filled.shape else tensor for name, tensor in state.items()}


def _load(path: Path) -> Any:
    # DeepSpeed's files hold objects of its own; they come from the run before
    return torch.load(path, map_location="cpu", weights_only=False)


def _tensors(content: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Every tensor in nested dicts and lists, with the keys that lead to it."""
    if isinstance(content, torch.Tensor):
        yield names, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, (*names, str(key)))
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _tensors(value, (*names, str(index)))


def _named(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return (("/".join(names), tensor) for names, tensor in _tensors(content))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and one[key].contiguous().view(-1).view(torch.uint8).equal(other[key].contiguous().view(-1).view(torch.uint8))
        for key in one
    )
