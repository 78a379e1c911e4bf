"""``axolotl spft combine``: a weighted sum of adapters."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from axolotl_spft.tools.options import json_option, output_option

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=_FOLDER)
@click.option("--weights", help="A number for each adapter, with commas between them; 1 by default.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of each matrix that is kept of the sum, its largest values; by default all positions of all adapters.",
)
@click.option(
    "--method",
    type=click.Choice(["linear", "ties"]),
    default="linear",
    show_default=True,
    help="linear: the sum. ties: at each position the mean of those that have the sign of the sum.",
)
@output_option
@json_option
def command(adapters, weights, density, method, output, as_json) -> None:
    """Add up adapters of the same base model.

    A table tells for each type of module how many positions the adapters have together, how many of those are in
    several of them, and at how many of these their signs differ. The tokenizer and the chat template are those of the
    first adapter that has them, before others of one whose embeddings have grown with it. For example:

    \b
      axolotl spft combine outputs/maths outputs/code --weights 1,0.5 --output outputs/both
      axolotl spft combine outputs/maths outputs/code --method ties --density 0.005 --output outputs/both
    """
    try:
        numbers = None if weights is None else [float(each) for each in weights.split(",")]
    except ValueError:
        raise click.UsageError(f"`--weights {weights}` must be numbers with commas between them, as 1,0.5") from None
    with redirect_stdout(sys.stderr):
        from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE, read_adapter, write_adapter
        from axolotl_spft.checkpoint.combine import combine
        from axolotl_spft.checkpoint.report import describe_combine
        from axolotl_spft.checkpoint.tokenizer_files import hand_on_tokenizer
        from axolotl_spft.files import check_writable

        check_writable(output / WEIGHTS_FILE)
        saved = {folder: read_adapter(folder) for folder in adapters}
        adapter, report = combine([saved[folder] for folder in adapters], numbers, density, method)
        write_adapter(output, adapter)
        report |= hand_on_tokenizer(sorted(saved, key=lambda folder: not saved[folder].others), output)
    click.echo(json.dumps({"output": str(output), **report}, indent=1) if as_json else describe_combine(output, report))
