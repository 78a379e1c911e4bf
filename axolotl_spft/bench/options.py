"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from axolotl_spft.bench.shapes import DEFAULT_SHAPE, SHAPES
from axolotl_spft.errors import SpftError

DTYPES = ("bf16", "fp32")
QUANTIZATIONS = ("none", "4bit")
MASKS = ("gradient", "drawn")
PROCESSES = ("shared", "isolated", "sequential")
DEFAULT_RANK = 6
# a checkout of the repository holds it beside the package
DEFAULT_STATISTICS = Path(__file__).parents[2] / "integration" / "bench" / "mask_statistics.json"


@dataclass(frozen=True)
class Options:
    """All that decides one comparison.

    One of ``rank`` and ``density`` sets the trained count; the other follows, so that all methods train equally many as
    nearly as LoRA's rank allows. Both together compare what is not equal: each method trains what is asked of it.

    Attributes:
        model: a shape's name or the path of a ``config.json``.
        width: another hidden_size, with everything else in proportion.
        tokens: of the one row that a step trains on.
        rank: of LoRA, its variants and SHiRA.
        density: share of the targeted weights that spft trains.
        mask: ``gradient`` runs the salience pass; ``drawn`` draws masks with the recorded concentration.
        area: draws masks whose used rows x used columns cover this share of each matrix.
        samples: rows that the salience pass reads.
        threads: of torch on the CPU; torch's own choice by default.
        processes: ``shared``: all methods in this one; ``isolated``: one each, all alive; ``sequential``: one each, one
            after the other, for models of which only one fits.
        serving: whether to save the adapter, and to switch and merge adapters.
    """

    methods: tuple[str, ...]
    model: str = DEFAULT_SHAPE
    width: int | None = None
    tokens: int = 512
    rank: int | None = None
    density: float | None = None
    dtype: str = "bf16"
    quantization: str = "none"
    gradient_checkpointing: bool = False
    mask: str = "gradient"
    mask_statistics: str = str(DEFAULT_STATISTICS)
    area: float | None = None
    samples: int = 8
    device: str = "cpu"
    threads: int | None = None
    rounds: int = 15
    processes: str = "shared"
    serving: bool = True

    def __post_init__(self):
        problems = [
            text
            for holds, text in (
                (self.methods, "name at least one method"),
                (self.rank is None or self.rank >= 1, f"`rank {self.rank}` must be at least 1"),
                (self.density is None or 0 < self.density <= 1, f"`density {self.density}` must be in (0, 1]"),
                (self.area is None or 0 < self.area <= 1, f"`area {self.area}` must be in (0, 1]"),
                (self.tokens >= 2, f"`tokens {self.tokens}` must be at least 2"),
                (self.rounds >= 1, f"`rounds {self.rounds}` must be at least 1"),
                (self.width is None or self.width >= 1, f"`width {self.width}` must be at least 1"),
                (self.threads is None or self.threads >= 1, f"`threads {self.threads}` must be at least 1"),
                (
                    self.device.partition(":")[0] in ("cpu", "cuda"),
                    f"`device {self.device}` must be cpu, cuda or cuda:<number>",
                ),
                (self.samples >= 1, f"`samples {self.samples}` must be at least 1"),
            )
            if not holds
        ]
        if problems:
            raise SpftError("benchmark: " + "; ".join(problems))
        if self.rank is None and self.density is None:
            object.__setattr__(self, "rank", DEFAULT_RANK)


def default_mask(model: str) -> str:
    """``gradient`` where the salience pass costs little, ``drawn`` for the big shapes."""
    return "drawn" if model in SHAPES and model != DEFAULT_SHAPE else "gradient"
