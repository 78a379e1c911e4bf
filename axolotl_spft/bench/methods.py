"""The fine-tuning methods that are compared, all on the same kind of base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

from axolotl_spft.bench.base import target_layers, target_modules
from axolotl_spft.bench.masking import MaskCost, Masking, mask_model
from axolotl_spft.budget import total_budget
from axolotl_spft.errors import SpftError
from axolotl_spft.metrics import METRICS
from axolotl_spft.optim import SparseAdamW
from axolotl_spft.salience.install import adapted_layers, install_masks
from axolotl_spft.tuner import SpftConfig

FIRST, SECOND = "default", "second"


class LeftOut(SpftError):
    """A method that cannot run here, among others that can; the message says why."""


class Budget(NamedTuple):
    """How much trains: LoRA's rank; and spft's density, or where that is None as many as LoRA."""

    rank: int
    density: float | None = None

    @classmethod
    def of(cls, base: nn.Module, rank: int | None, density: float | None) -> Budget:
        """``rank``, or where it is None the one that trains as nearly as many as ``density`` as whole ranks allow."""
        if rank is not None:
            return cls(rank, density)
        shapes = [(layer.out_features, layer.in_features) for layer in target_layers(base).values()]
        per_rank = total_budget(shapes, match_lora_rank=1)
        return cls(max(1, round(total_budget(shapes, density=density) / per_rank)), density)

    def of_spft(self) -> dict[str, float]:
        return {"match_lora_rank": self.rank} if self.density is None else {"density": self.density}


@dataclass
class Method:
    """A model that is ready to train.

    Attributes:
        optimizer: None where nothing trains.
        trained: how many numbers train.
        area: share of the matrices that the mask's used rows x used columns cover.
        mask_cost: of the salience pass, where one ran.
        add_second: adds a second adapter of the same kind and size, named `SECOND`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    trained: int
    area: float | None = None
    mask_cost: MaskCost | None = None
    add_second: Callable[[], None] | None = None


def limit(base: nn.Module, budget: Budget, masking: Masking) -> Method:
    """Forward and dX of the frozen model: what any adapter must pay."""
    return Method(base, None, 0)


def full(base: nn.Module, budget: Budget, masking: Masking) -> Method:
    """Every targeted weight trains."""
    for layer in target_layers(base).values():
        layer.weight.requires_grad_(True)
    return Method(base, _adamw(base), _trained(base))


def _peft(base: nn.Module, config_of: Callable[[], PeftConfig], dtype: torch.dtype) -> Method:
    model = get_peft_model(base, config_of(), FIRST, autocast_adapter_dtype=False)

    def add_second() -> None:
        model.add_adapter(SECOND, config_of(), autocast_adapter_dtype=False)
        _cast_trained(model, dtype)

    _cast_trained(model, dtype)
    return Method(model, _adamw(model), _trained(model), add_second=add_second)


def _lora_of(**variant: bool) -> Callable[..., Method]:
    def build(base: nn.Module, budget: Budget, masking: Masking) -> Method:
        """LoRA with factors in the base's compute dtype, its faster setting."""
        targets = target_modules(base)
        return _peft(base, lambda: LoraConfig(r=budget.rank, target_modules=targets, **variant), base.dtype)

    return build


def shira(base: nn.Module, budget: Budget, masking: Masking) -> Method:
    """PEFT's SHiRA with its random mask."""
    for name, layer in target_layers(base).items():
        if budget.rank * (layer.in_features + layer.out_features) > layer.weight.numel():
            raise LeftOut(f"SHiRA of rank {budget.rank} would train more than all of {name}")
    targets = target_modules(base)
    return _peft(base, lambda: ShiraConfig(r=budget.rank, target_modules=targets), base.dtype)


def _spft_of(salience: str, scope: str) -> Callable[..., Method]:
    def build(base: nn.Module, budget: Budget, masking: Masking) -> Method:
        """This package, with fp32 values."""

        def config() -> SpftConfig:
            # one more sample than there are: so the pass reads to the end, which tells when it has ended
            samples = masking.samples + 1
            return SpftConfig(
                **budget.of_spft(), target_modules=targets, salience=salience, scope=scope, samples=samples
            )

        targets = target_modules(base)
        model = get_peft_model(base, config(), FIRST)
        report, cost = mask_model(model, masking)
        area = sum(matrix.used_rows * matrix.used_columns for matrix in report.matrices) / report.entries
        optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def add_second() -> None:
            model.add_adapter(SECOND, config())
            masks = {name: layer.mask(FIRST) for name, layer in adapted_layers(model).items()}
            install_masks(model, SECOND, masks, {"salience": salience})

        return Method(model, optimizer, report.selected, area, cost, add_second)

    return build


class Entry(NamedTuple):
    """How a method is built, and why it cannot run on a 4-bit base, where it cannot."""

    build: Callable[[nn.Module, Budget, Masking], Method]
    not_on_4bit: str | None = None


_LISTED = ("gradient", "balanced", "random")
METHODS: Mapping[str, Entry] = {
    "limit": Entry(limit),
    "spft-gradient": Entry(_spft_of("gradient", "layer")),
    "spft-gradient-row": Entry(_spft_of("gradient", "row")),
    "spft-balanced": Entry(_spft_of("balanced", "layer")),
    "spft-random": Entry(_spft_of("random", "layer")),
    "lora": Entry(_lora_of()),
    "rslora": Entry(_lora_of(use_rslora=True)),
    "dora": Entry(_lora_of(use_dora=True)),
    "shira": Entry(shira, "PEFT's SHiRA adapts only unquantized torch.nn.Linear layers"),
    "full": Entry(full, "quantized weights take no gradient"),
    # a row for each further salience: their passes differ
    **{f"spft-{name}": Entry(_spft_of(name, "layer")) for name in METRICS if name not in _LISTED},
}


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # as transformers' trainer by default
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    # on a quantized base PEFT makes the factors in float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
