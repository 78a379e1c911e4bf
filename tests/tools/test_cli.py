"""The group `axolotl spft` and its command `bench`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from axolotl_spft.bench.options import Options
from axolotl_spft.bench.sweep import SWEPT
from axolotl_spft.tools import bench
from axolotl_spft.tools.cli import spft
from tests.bench.conftest import TINY


def test_help_lists_every_command_and_loads_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from axolotl_spft.tools.cli import spft\n"
        "for args in (['--help'], ['bench', '--help']): print(CliRunner().invoke(spft, args).output)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.search("bench +Compare a training step", output) and "--gradient-checkpointing" in output
    assert output.endswith("[]\n")


@pytest.mark.parametrize("name", spft.list_commands(None))
def test_every_command_explains_every_option_and_refuses_others_in_one_line(name):
    command = spft.get_command(None, name)
    assert command.help and all(each.help for each in command.params if each.param_type_name == "option")
    result = CliRunner().invoke(spft, [name, "--no-such-option"])
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "axolotl_spft", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("Usage: python -m axolotl_spft [OPTIONS] COMMAND")


def test_bench_measures_and_writes(tmp_path):
    config, output = tmp_path / "config.json", tmp_path / "bench.json"
    config.write_text(json.dumps(TINY))
    arguments = ["bench", "--model", str(config), "--tokens", "16", "--rounds", "2", "--rank", "1", "--threads", "1",
                 "--method", "limit", "--method", "lora", "--no-serving", "--output", str(output)]  # fmt: skip
    result = CliRunner().invoke(spft, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "| lora " in result.output
    assert [row["method"] for row in json.loads(output.read_text())["rows"]] == ["limit", "lora"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rank", "2", "--density", "1.5"], "`density 1.5` must be in (0, 1]"),
        (["--model", "llama-9b", "--method", "limit"], "is neither a file nor one of"),
        (["1", "2"], "VALUES belong to --sweep"),
        (["--sweep", "tokens"], "needs values"),
        (["--mask", "gradient", "--area", "0.5"], "masks of a given area are drawn"),
        (["--width", "0"], "`width 0` must be at least 1"),
        (["--threads", "0"], "`threads 0` must be at least 1"),
        (["--device", "foo"], "`device foo` must be cpu, cuda"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    result = CliRunner().invoke(spft, ["bench", *arguments])
    assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(spft, ["cli"])
    assert result.exit_code == 2 and "No such command 'cli'" in result.output


def test_a_sweep_measures_few_methods_and_the_big_shapes_draw_their_masks(monkeypatch):
    asked = []
    monkeypatch.setattr("axolotl_spft.bench.main.run_sweep", lambda *args: asked.append(args))
    monkeypatch.setattr("axolotl_spft.bench.main.run_comparison", lambda *args: asked.append(args))
    for arguments in (["--sweep", "area", "0.1", "0.2"], ["--model", "llama-70b", "--sequential"], []):
        CliRunner().invoke(spft, ["bench", "--device", "cpu", *arguments], catch_exceptions=False)
    (swept, over, values, *_), (big, *_), (plain, *_) = asked
    assert (swept.methods, swept.serving, over, values) == (bench.SWEEP_METHODS, False, "area", ("0.1", "0.2"))
    assert (big.mask, big.processes, plain.mask, plain.processes) == ("drawn", "sequential", "gradient", "shared")
    assert plain == Options(methods=bench.METHODS, dtype=plain.dtype)


def test_the_names_that_help_spells_out_are_the_real_ones():
    assert tuple(SWEPT) == bench.SWEPT


def test_axolotl_finds_the_group():
    found = [entry for entry in entry_points(group="axolotl.cli_commands") if entry.name == "spft"]
    if not found:
        pytest.skip("the package is not installed with its entry points")
    assert found[0].load() is spft
    axolotl = shutil.which("axolotl", path=str(Path(sys.executable).parent))
    if axolotl is None:
        pytest.skip("no axolotl command beside this Python")
    output = subprocess.run([axolotl, "spft", "bench", "--help"], capture_output=True, text=True, check=True).stdout
    assert "Usage: axolotl spft bench" in output


def test_bench_takes_the_precision_that_the_processor_has(monkeypatch):
    from axolotl_spft.bench import main
    from axolotl_spft.ops.backends import products

    chosen = []
    monkeypatch.setattr(main, "run_comparison", lambda options, *_: chosen.append(options.dtype))
    for lacks, arguments in ((True, []), (False, []), (True, ["--dtype", "bf16"])):
        monkeypatch.setattr(products, "lacks_instructions", lambda _, lacks=lacks: lacks)
        result = CliRunner().invoke(bench.command, ["--device", "cpu", *arguments])
        assert result.exit_code == 0, result.output
    assert chosen == ["fp32", "bf16", "bf16"]
