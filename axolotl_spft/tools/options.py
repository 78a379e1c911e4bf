"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
output_option = click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the new adapter."
)
