"""`SpftConfig`: the options of sparse fine-tuning and their defaults.

This is the only place where defaults live; the YAML block of the Axolotl plugin has the same fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from axolotl_spft.budget import missing_allowed, total_budget
from axolotl_spft.card import say_how_to_load
from axolotl_spft.config_rules import BUDGETS, DEFAULT_DENSITY, check_options
from axolotl_spft.errors import SpftConfigError
from axolotl_spft.files import check_safetensors, count_entries
from axolotl_spft.metrics import METRICS
from axolotl_spft.peft_type import SPFT


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SpftConfig(PeftConfig):
    """Options of salience-aware sparse fine-tuning (Liu et al., ACL 2025, arXiv 2412.13488).

    Every targeted weight W (out_features, in_features) stays frozen; trained are ``values`` at fixed positions, the
    entries of a sparse S in y = x (W + S)^T + b. How many there are is set by exactly one of ``density``,
    ``num_values`` and ``match_lora_rank``; without any of them the density is 0.005.

    Raises:
        SpftConfigError: one or several options break a rule; all are reported together.
    """

    density: float | None = _option(None, "Share of the targeted weights that is trained, in (0, 1].")
    num_values: int | None = _option(None, "How many values are trained over all targeted weights.")
    match_lora_rank: int | None = _option(None, "Train as many values as a LoRA of this rank on the same modules.")
    density_pattern: dict[str, float] | None = _option(
        None, "{regular expression of module names: density} for matrices that get another share than the rest."
    )
    min_density: float | None = _option(None, "At least this share of each matrix is trained under scope global.")
    max_density: float | None = _option(None, "At most this share of each matrix is trained under scope global.")
    target_modules: list[str] | str | None = _option(
        "all-linear", "Modules to adapt: 'all-linear', a list of names, or a regular expression; [] for none."
    )
    target_parameters: list[str] | None = _option(
        None, "Weights of experts to adapt too: names of parameters of three dimensions, as PEFT's target_parameters."
    )
    exclude_modules: list[str] | str | None = _option(None, "Modules to leave alone: names or a regular expression.")
    layers_to_transform: list[int] | int | None = _option(None, "Indices of the layers to adapt; all by default.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the module list that holds the layers.")
    modules_to_save: list[str] | None = _option(None, "Further modules that are trained and saved whole.")
    bias: str = _option("none", "Biases that are trained and saved whole: none, or all of the model.")
    salience: str = _option(
        "gradient", f"Score of a weight's importance: one of {', '.join(METRICS)}, or package.module:function."
    )
    lift_rank: int = _option(
        128, "Rank of the approximation that salience 'lift' reads; at most half the smaller side."
    )
    scope: str = _option(
        "layer", "Where scores compete: inside each matrix (layer), over all (global), in each output row (row)."
    )
    pattern: str = _option("element", "What is chosen: single entries (element), or whole blocks of them (block).")
    block_size: list[int] = _option([64, 64], "Rows and columns of a block; read with pattern: block.")
    samples: int = _option(128, "Training examples that the salience pass reads.")
    score_after: int = _option(0, "Optimizer steps of a throw-away warm-up before the salience is computed.")
    salience_memory_gib: float | None = _option(
        None,
        "GiB that the sums of the salience pass may take on a GPU, by default half of what is free. More are kept on "
        "the host by default; with this key they take several passes, or with scope global or blocks go to the host.",
    )
    repair: float = _option(
        0.0,
        "Of a quantized base: share of the budget that goes to the entries with the largest quantization error. Above "
        "0, all values begin at the weight from before quantization.",
    )
    repair_from: str | None = _option(
        None, "Folder, or name on the hub, of the unquantized weights, where these are not the base model's."
    )
    seed: int | None = _option(None, "Seed of random choices; the run's seed under Axolotl, else 0.")
    mask_path: str | None = _option(None, "A saved mask: used when the file exists, else computed and saved there.")
    reselect: dict[str, Any] | None = _option(
        None, "Dynamic mask: {every, fraction, until, collect, drop}; see axolotl_spft/dynamic/README.md."
    )
    relative_step: bool = _option(
        False, "The run's learning rate is in units of rms(W) (0.005 / density)^0.75, W the targeted weights."
    )
    init_weights: bool = _option(
        True, "True: empty until select_mask. False: random positions and values at once (for generic PEFT tests)."
    )
    nnz: int | None = _option(None, "Recorded: how many values the adapter holds.")
    base_shapes: str | None = _option(None, "Recorded: fingerprint of the targeted modules' names and shapes.")
    mask_source: dict | None = _option(None, "Recorded: salience, scope, samples read and seed that made the mask.")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SPFT
        # a model records in a config of its own, so only what is made from a saved one begins with a record
        self.is_saved = self.nnz is not None
        # in a model whose saved adapter is still to be loaded: what was recorded of it
        self.awaited: dict[str, Any] | None = None
        if not any(getattr(self, name) is not None for name in BUDGETS):
            self.density = DEFAULT_DENSITY
        if self.target_modules is None:
            self.target_modules = "all-linear"
        problems = check_options({name: getattr(self, name) for name in option_names()})
        if problems:
            raise SpftConfigError(problems)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) of the blocks that are trained whole, or None where single entries are."""
        return (self.block_size[0], self.block_size[1]) if self.pattern == "block" else None

    def budget(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments of `axolotl_spft.budget.total_budget` and `layer_budgets` for matrices of these names."""
        options = {name: getattr(self, name) for name in BUDGETS}
        return options | {"density_pattern": self.density_pattern, "names": names}

    def allowed_counts(self, shapes: Mapping[str, tuple[int, int]]) -> range:
        """How many values a mask for matrices of these shapes, by name, may hold: blocks need not meet the budget."""
        total = total_budget(list(shapes.values()), **self.budget(list(shapes)))
        bounded = bool(self.density_pattern) or self.min_density is not None or self.max_density is not None
        return range(total - missing_allowed(list(shapes.values()), self.block, self.scope, bounded), total + 1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SpftConfig:
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        weights = folder / "adapter_model.safetensors"
        # PEFT reads the weights only after it has changed the model: look at the file before that
        if weights.is_file():
            check_safetensors(weights)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's. Beside an adapter's weights it says in the model card what they are, and warns of none."""
        super().save_pretrained(save_directory, **kwargs)
        # PEFT writes them before
        weights = Path(save_directory, "adapter_model.safetensors")
        if not weights.is_file():
            return
        say_how_to_load(weights.parent)
        if not count_entries(weights, ".spft_values"):
            warnings.warn(
                f"the adapter saved in {save_directory} holds no values: call select_mask(model, batches), or give the "
                "trainer an SpftCallback, before training",
                stacklevel=2,
            )


RECORDED = ("nnz", "base_shapes", "mask_source")
# options that say where an adapter's layers are, how it begins or how a run changes it, and nothing of how its mask is
# chosen
_OF_THE_PLACE = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
                 "modules_to_save", "bias", "mask_path", "repair_from", "reselect", "relative_step",
                 "init_weights")  # fmt: skip


def option_names() -> tuple[str, ...]:
    """Names of the options that users set, in the order of the class."""
    inherited = {f.name for f in fields(PeftConfig)}
    return tuple(f.name for f in fields(SpftConfig) if f.name not in inherited and f.name not in RECORDED)


def mask_option_names() -> tuple[str, ...]:
    """Names of the options that say how a mask is chosen, its budget among them."""
    return tuple(name for name in option_names() if name not in _OF_THE_PLACE)
