"""``axolotl spft plan``: the memory of a run before it."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(context_settings={"show_default": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="How many processes train. By default 8 where the configuration has `deepspeed`, else 1.",
)
@click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), default=80.0, help="GiB of one GPU.")
@click.option(
    "--shape",
    help="Instead of base_model's own config.json: the path of one, or the name of a shape, such as llama-8b.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone, in bytes.")
def command(config: Path, gpus: int | None, gpu_memory: float, shape: str | None, as_json: bool) -> None:
    """Tell what a run of CONFIG will need on each GPU, what fits, and what to change when it does not.

    Only the config.json of the base model is read. For example:

    \b
      axolotl spft plan config.yml
      axolotl spft plan config.yml --gpus 8 --gpu-memory 80
      axolotl spft plan config.yml --shape llama-8b --json
    """
    import json

    from axolotl_spft.planning import report
    from axolotl_spft.planning.advice import alternatives, changes_that_help
    from axolotl_spft.planning.estimate import GIB, estimate
    from axolotl_spft.planning.settings import quantized, read_settings
    from axolotl_spft.planning.shapes import find_config, read_shape

    run = read_settings(config, gpus)
    model_config, source = find_config(run.base_model, shape, run.trust_remote_code, run.revision)
    for name, value in run.overrides.items():
        # as Axolotl does before the model is made
        setattr(model_config, name, value)
    run = quantized(run, getattr(model_config, "quantization_config", None))
    found_shape = read_shape(model_config, run.options, run.trust_remote_code)
    gpu_bytes = round(gpu_memory * GIB)
    found = estimate(found_shape, run, gpu_bytes)
    plan = report.Plan(
        source, found_shape, run, found, alternatives(found_shape, run, gpu_bytes),
        changes_that_help(found_shape, run, gpu_bytes), gpu_bytes,
    )  # fmt: skip
    print(json.dumps(report.as_json(plan), indent=1) if as_json else report.as_text(plan))
