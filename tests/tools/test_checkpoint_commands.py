"""The commands merge, extract, combine and convert, as users call them."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from axolotl_spft.checkpoint.adapter import read_adapter
from axolotl_spft.plugin.streamed_merge import merge_arguments
from axolotl_spft.tools.cli import spft
from tests.checkpoint.saved import contents, save_adapter, save_base
from tests.models import tiny_llama


def _run(*arguments):
    return CliRunner().invoke(spft, [str(each) for each in arguments])


def test_every_command_does_its_work_and_prints_json_alone(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = save_adapter(tmp_path / "run", base)
    config = tmp_path / "config.yml"
    config.write_text(f"base_model: {base}\nadapter: spft\noutput_dir: {adapter}\nbf16: true\n")
    by_config, by_adapter = _run("merge", config), _run("merge", adapter, "--base", base, "--output", tmp_path / "two")
    told = f"values of {adapter} merged onto the base as it is"
    assert by_config.exit_code == 0 and told in by_config.stdout, by_config.output
    assert contents(adapter / "merged") == contents(tmp_path / "two") and by_adapter.exit_code == 0
    quantized = ("--quantization", "nf4", "--output", tmp_path / "four", "--json")
    report = json.loads(_run("merge", adapter, "--base", base, *quantized).stdout)
    assert report["onto"] == "quantized" and report["difference_from_trained"] == 0
    extracted = _run(
        "extract", "--base", base, "--tuned", adapter / "merged", "--density", 1, "--output", tmp_path / "x", "--json"
    )
    assert json.loads(extracted.stdout)["values"] == read_adapter(tmp_path / "x").nnz
    arguments = ("combine", adapter, tmp_path / "x", "--weights", "1,-1", "--output", tmp_path / "sum")
    assert "module type" in _run(*arguments).stdout
    assert json.loads(_run(*arguments, "--json").stdout)["modules"]["up_proj"]["shared"] > 0
    converted = _run("convert", adapter, "--base", base, "--output", tmp_path / "shira", "--json")
    assert json.loads(converted.stdout)["to"] == "shira"


@pytest.mark.parametrize("name", ["merge", "extract", "combine", "convert"])
def test_help_is_complete_and_mistakes_are_one_line_with_exit_status_2(tmp_path, name):
    command = spft.get_command(None, name)
    assert all(option.help for option in command.params if option.param_type_name == "option")
    assert f"axolotl spft {name} " in _run(name, "--help").output
    required = {"extract": ["--base", "b", "--tuned", "t", "--density", 1, "--output", tmp_path / "o"]}
    for arguments in ([name, "--no-such-option"], [name, *required.get(name, ["absent", "--output", tmp_path / "o"])]):
        result = _run(*arguments)
        assert result.exit_code == 2 and result.stdout == "", result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), lines


def test_a_configuration_tells_how_training_saw_the_base(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    cfg = {"adapter": "spft", "base_model": str(base), "output_dir": "out", "load_in_4bit": True}
    arguments = merge_arguments(cfg | {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, "config.yml")
    assert arguments["quantization"]["bnb_4bit_quant_type"] == "fp4"
    assert arguments["quantization"]["bnb_4bit_use_double_quant"] and arguments["dtype"] == torch.bfloat16
    assert merge_arguments(cfg | {"load_in_4bit": False}, "config.yml")["quantization"] == {}
    for changed, message in (
        ({"adapter": "lora"}, "config.yml: `adapter: lora` must be spft"),
        ({"base_model": None}, "`base_model` is missing"),
        ({"output_dir": None}, "neither `lora_model_dir` nor `output_dir`"),
    ):
        path = tmp_path / "config.yml"
        path.write_text(json.dumps(cfg | changed))
        result = _run("merge", path)
        assert result.exit_code == 2 and message in result.stderr
