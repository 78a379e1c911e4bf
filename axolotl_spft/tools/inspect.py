"""``axolotl spft inspect``: what a mask or an adapter looks like."""

from __future__ import annotations

import json
from pathlib import Path

import click

from axolotl_spft.tools.options import json_option

_EXISTING = click.Path(exists=True, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("files", metavar="FILE [FILE]", nargs=-1, required=True, type=_EXISTING)
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the base model (safetensors, not quantized): relative changes of an adapter need it.",
)
@json_option
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw a picture here (png, pdf or svg; matplotlib).",
)
@click.option(
    "--page", type=click.Path(dir_okay=False, path_type=Path), help="Write one self-contained HTML page here."
)
def command(files: tuple[Path, ...], base: Path | None, as_json: bool, picture: Path | None, page: Path | None) -> None:
    """Show a mask or an adapter, or how much two of them share.

    FILE is a mask file, an adapter's folder or its adapter_model.safetensors. Tables by module type and by layer tell
    the entries, their share, the rows and columns that hold one, the area that these span, and how many entries the
    fullest tenth of the rows and of the columns hold; of an adapter also its values. For example:

    \b
      axolotl spft inspect mask.safetensors
      axolotl spft inspect outputs/run --base models/base --picture run.png --page run.html
      axolotl spft inspect first.safetensors second.safetensors --json
    """
    if len(files) > 2:
        raise click.UsageError(f"{len(files)} files were given: name one, or two to compare")
    from axolotl_spft.files import check_writable
    from axolotl_spft.inspection.inspect import inspect_files

    if picture:
        from axolotl_spft.inspection.picture import check_picture

        check_picture(picture)
    if page:
        check_writable(page)
    inspection = inspect_files(files, base)
    if as_json:
        from axolotl_spft.inspection.as_json import figures_as_json

        click.echo(json.dumps(figures_as_json(inspection), indent=1, allow_nan=False))
    else:
        from axolotl_spft.inspection.text import describe

        click.echo(describe(inspection))
    if picture:
        from axolotl_spft.inspection.picture import draw

        draw(inspection, picture)
    if page:
        from axolotl_spft.inspection.page import write_page

        write_page(inspection, page)
