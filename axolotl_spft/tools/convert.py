"""``axolotl spft convert``: PEFT's SHiRA adapters to ours and back."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from axolotl_spft.tools.options import json_option, output_option


@click.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", type=click.Choice(["spft", "shira"]), help="By default the other kind of what ADAPTER is.")
@click.option("--base", help="The base model, whose config tells shapes and kinds of modules. The adapter records one.")
@output_option
@json_option
def command(adapter, to, base, output, as_json) -> None:
    """Convert an adapter between PEFT's SHiRA and this package; what it computes stays the same.

    SHiRA trains equally many values, r (out_features + in_features), in every matrix: a sparse adapter with fewer is
    filled up with zeros. For example:

    \b
      axolotl spft convert outputs/shira --base models/base --output outputs/sparse
      axolotl spft convert outputs/sparse --to shira --output outputs/shira
    """
    with redirect_stdout(sys.stderr):
        from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
        from axolotl_spft.checkpoint.conversion import convert
        from axolotl_spft.files import check_writable

        check_writable(output / WEIGHTS_FILE)
        report = convert(adapter, output, to, base)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        zeros = f", {report['zeros_added']:,} zeros added, rank {report['rank']}" if "rank" in report else ""
        click.echo(f"{output}: {report['values']:,} values as {report['to']}{zeros}")
        if report.get("modules_checked") is False:
            click.echo("It is not known whether SHiRA adapts all of its modules: name the base model with `--base`")
