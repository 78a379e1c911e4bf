"""``axolotl spft bench``: the benchmark of a training step."""

from __future__ import annotations

from pathlib import Path

import click

from axolotl_spft.bench.options import (
    DEFAULT_RANK,
    DEFAULT_STATISTICS,
    DTYPES,
    MASKS,
    QUANTIZATIONS,
    Options,
    default_mask,
)
from axolotl_spft.bench.shapes import DEFAULT_SHAPE, SHAPES
from axolotl_spft.metrics import METRICS

# spelled out, so that --help does not import torch
METHODS = (
    "limit", "spft-gradient", "spft-gradient-row", "spft-balanced", "spft-random", "lora", "rslora", "dora", "shira",
    "full",
)  # fmt: skip
# their steps cost what those of the others do; their passes differ
OF_SALIENCES = tuple(f"spft-{name}" for name in METRICS if f"spft-{name}" not in METHODS)
SWEEP_METHODS = ("limit", "spft-gradient", "lora")
SWEPT = ("tokens", "density", "width", "area")


@click.command(context_settings={"show_default": True})
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice((*METHODS, *OF_SALIENCES)),
    help="A method to measure; may be repeated. By default all but those of further saliences "
    f"({', '.join(OF_SALIENCES)}), in a sweep {', '.join(SWEEP_METHODS)}.",
)
@click.option(
    "--model",
    default=DEFAULT_SHAPE,
    help=f"A shape with random weights: {', '.join(SHAPES)}, or the path of a config.json.",
)
@click.option("--width", type=int, help="Another hidden size, with the rest of the shape in proportion.")
@click.option("--tokens", type=int, default=512, help="Tokens of a step, in one row.")
@click.option("--rank", type=int, help=f"LoRA's rank; without --density all train as many. {DEFAULT_RANK} by default.")
@click.option("--density", type=float, help="The share that spft trains; without --rank LoRA gets the nearest.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the base and of the computation. By default bf16, but fp32 on a CPU without instructions for bf16.",
)
@click.option(
    "--quantization",
    type=click.Choice(QUANTIZATIONS),
    default="none",
    help="Of the base: 4bit is bitsandbytes' nf4, and `lora` then QLoRA.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute each block in the backward pass.")
@click.option(
    "--mask",
    type=click.Choice(MASKS),
    help="gradient: run the salience pass. drawn: as concentrated as recorded for a real model. "
    "By default drawn for the big named shapes, else gradient.",
)
@click.option(
    "--mask-statistics",
    type=click.Path(),
    default=str(DEFAULT_STATISTICS),
    show_default=False,
    help="The record that `--mask drawn` reads; integration/bench/mask_statistics.json of a checkout.",
)
@click.option("--area", type=float, help="Draw masks whose used rows x used columns cover this share of a matrix.")
@click.option("--samples", type=int, default=8, help="Rows that the salience pass reads.")
@click.option("--device", default="auto", help="auto: a GPU where there is one.")
@click.option("--threads", type=int, help="Of torch on a CPU; its own choice by default.")
@click.option("--rounds", type=int, default=15, help="Timed steps of each method.")
@click.option(
    "--isolate",
    "processes",
    flag_value="isolated",
    help="One process for each method, all alive: tells the peak memory on a CPU too.",
)
@click.option(
    "--sequential",
    "processes",
    flag_value="sequential",
    help="One process for each method, one after the other: where memory holds only one.",
)
@click.option(
    "--serving/--no-serving",
    default=None,
    show_default=False,
    help="Measure the adapter's file, switching and merging. By default yes, in a sweep no.",
)
@click.option("--sweep", type=click.Choice(SWEPT), help="Repeat at every one of VALUES of this option.")
@click.option("--output", type=click.Path(path_type=Path), help="Write all figures here as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures here (png, pdf or svg; matplotlib).")
@click.argument("values", nargs=-1)
def command(sweep, values, output, plot, **chosen) -> None:  # fmt: skip
    """Compare a training step with LoRA's, SHiRA's, full fine-tuning's and the limit's.

    The limit is the frozen model's forward pass and gradient of the inputs, which every adapter must pay. Methods take
    turns in one process, so that a ratio of medians compares like with like. For example:

    \b
      axolotl spft bench
      axolotl spft bench --model llama-8b --quantization 4bit --tokens 4096 --rank 16
      axolotl spft bench --sweep tokens 256 512 1024 --output tokens.json --plot tokens.png
    """
    options = _options(sweep, values, **chosen)
    from axolotl_spft.bench.main import run_comparison, run_sweep

    if sweep:
        run_sweep(options, sweep, values, output, plot)
    else:
        run_comparison(options, output, plot)


def _options(sweep, values, methods, mask, device, dtype, processes, serving, **others) -> Options:
    if values and not sweep:
        raise click.UsageError(f"unexpected {' '.join(values)}: VALUES belong to --sweep")
    of_area = others["area"] is not None or sweep == "area"
    if mask == "gradient" and of_area:
        raise click.UsageError("masks of a given area are drawn: leave `--mask gradient` out, or the area")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        import torch

        from axolotl_spft.ops.backends.products import lacks_instructions

        dtype = "fp32" if device == "cpu" and lacks_instructions(torch.bfloat16) else "bf16"
    return Options(
        methods=methods or (SWEEP_METHODS if sweep else METHODS),
        mask=mask or ("drawn" if of_area else default_mask(others["model"])),
        device=device,
        dtype=dtype,
        processes=processes or "shared",
        serving=not sweep if serving is None else serving,
        **others,
    )
