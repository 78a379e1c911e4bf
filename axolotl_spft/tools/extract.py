"""``axolotl spft extract``: a sparse adapter out of a fully fine-tuned model."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import click

from axolotl_spft.tools.options import json_option, output_option


@click.command()
@click.option("--base", required=True, help="The model before fine-tuning: a folder, or a name of the hub.")
@click.option("--tuned", required=True, help="The model after it.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    required=True,
    help="Share of the entries of the linear layers that is kept. 1 keeps every difference.",
)
@click.option(
    "--scope",
    type=click.Choice(["layer", "global"]),
    default="layer",
    show_default=True,
    help="layer: the largest differences of each matrix. global: the largest of all.",
)
@output_option
@click.option("--trust-remote-code", is_flag=True, help="Run the code that the base model brings.")
@json_option
def command(base, tuned, density, scope, output, trust_remote_code, as_json) -> None:
    """Keep the largest changes that full fine-tuning made, as an adapter.

    One matrix is in memory at a time. Norms, embeddings and the like are kept whole where they differ. The
    tokenizer and the chat template are those of the tuned model. For example:

    \b
      axolotl spft extract --base models/base --tuned outputs/full --density 0.01 --output outputs/sparse
    """
    with redirect_stdout(sys.stderr):
        from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE, write_adapter
        from axolotl_spft.checkpoint.extract import extract
        from axolotl_spft.checkpoint.report import describe_extract
        from axolotl_spft.checkpoint.shards import find_checkpoint
        from axolotl_spft.checkpoint.tokenizer_files import hand_on_tokenizer
        from axolotl_spft.files import check_writable

        check_writable(output / WEIGHTS_FILE)
        adapter, report = extract(base, tuned, density, scope, trust_remote_code)
        write_adapter(output, adapter)
        hand_on_tokenizer([find_checkpoint(tuned, companions=True)], output)
    click.echo(json.dumps({"output": str(output), **report}, indent=1) if as_json else describe_extract(output, report))
