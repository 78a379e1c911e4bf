"""``axolotl spft merge``: the adapter into the weights of its base model."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from axolotl_spft.tools.options import json_option

_FOLDER = click.Path(file_okay=False, path_type=Path)
_SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@click.command()
@click.argument("source", metavar="CONFIG_OR_ADAPTER", type=click.Path(exists=True, path_type=Path))
@click.option("--base", help="The unquantized base model: a folder, or a name of the hub. The adapter records one.")
@click.option(
    "--revision", help="Branch, tag or commit of the base on the hub. The adapter records the commit, if it had one."
)
@click.option("--output", type=_FOLDER, help="Folder of the merged model. By default `merged` in the adapter's folder.")
@click.option(
    "--onto",
    type=click.Choice(["base", "quantized"]),
    help="base: onto the base as it is. quantized: onto the base as training on 4 or 8 bits saw it, which is what was "
    "trained. By default quantized where the run was, else base.",
)
@click.option(
    "--quantization",
    type=click.Choice(list(_SETTINGS)),
    help="How training quantized the base, if the adapter does not record it, as older ones do not.",
)
@click.option(
    "--double-quantization/--no-double-quantization",
    default=True,
    show_default=True,
    help="Whether `--quantization nf4` or fp4 quantized the scales too, as Axolotl does.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="What the base was loaded in before it was quantized, if the adapter does not record it; bfloat16 by default.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model in the output folder that is no earlier merge.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that the base model brings.")
@json_option
def command(
    source,
    base,
    revision,
    output,
    onto,
    quantization,
    double_quantization,
    dtype,
    overwrite,
    trust_remote_code,
    as_json,
) -> None:
    """Merge an adapter into its base model, file by file.

    CONFIG_OR_ADAPTER is the configuration file of a run, or a saved adapter's folder. No model is loaded and no GPU is
    needed; four tensors are in memory at a time. The output has the files of the base under the names of the base, with
    its config, tokenizer and chat template. A command that was interrupted goes on where it was. For example:

    \b
      axolotl spft merge config.yml
      axolotl spft merge outputs/run --base models/base --output outputs/merged
      axolotl spft merge outputs/old --quantization nf4 --dtype bfloat16
    """
    with redirect_stdout(sys.stderr):
        from axolotl_spft.checkpoint.merge import merge
        from axolotl_spft.checkpoint.report import describe_merge
        from axolotl_spft.tuner.trained_on import DTYPES

        arguments = (
            {"adapter_folder": source, "output": source / "merged"} if source.is_dir() else _of_run(source, base)
        )
        if quantization:
            settings = _SETTINGS[quantization]
            double = {"bnb_4bit_use_double_quant": double_quantization} if "load_in_4bit" in settings else {}
            arguments["quantization"] = settings | double
            if not settings:
                arguments.pop("dtype", None)
        if dtype:
            arguments["dtype"] = DTYPES[dtype]
        arguments["trust_remote_code"] = trust_remote_code or arguments.get("trust_remote_code", False)
        arguments["overwrite"] = overwrite
        given = {"base": base, "revision": revision, "output": output, "onto": onto}
        report = merge(**arguments | {key: value for key, value in given.items() if value is not None})
    click.echo(json.dumps(report, indent=1) if as_json else describe_merge(report))


def _of_run(path: Path, base: str | None) -> dict:
    import yaml

    from axolotl_spft.errors import SpftFileError, first_line
    from axolotl_spft.plugin.streamed_merge import merge_arguments

    try:
        cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpftFileError(f"{path} is not YAML: {first_line(error)}") from error
    if not isinstance(cfg, dict):
        raise SpftFileError(f"{path} must be an Axolotl configuration, or name the folder of an adapter")
    return merge_arguments(cfg, str(path), base=base)
