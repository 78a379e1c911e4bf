"""``axolotl spft mask``: the salience pass without the training."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The mask file to write."
)
def command(config: Path, output: Path) -> None:
    """Compute the mask that training with CONFIG would train, save it, and stop.

    Look at it with `axolotl spft inspect`, and train with `mask_path: <output>` in the block `spft`: the run equals
    the one that computes its mask itself. On several GPUs, launch it as the training:

    \b
      axolotl spft mask config.yml -o mask.safetensors
      accelerate launch -m axolotl_spft mask config.yml -o mask.safetensors
    """
    from axolotl_spft.plugin.mask_run import compute_mask

    if compute_mask(config, output):
        click.echo(f"The mask is in {output}. Look at it: axolotl spft inspect {output}")
