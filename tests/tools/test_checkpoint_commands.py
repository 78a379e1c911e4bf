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


def test_a_merge_over_another_model_has_to_be_asked_for(tmp_path):
    base, other = (save_base(tmp_path / name, tiny_llama) for name in ("base", "other"))
    before = contents(other)
    arguments = ("merge", save_adapter(tmp_path / "run", base), "--base", base, "--output", other)
    refused = _run(*arguments)
    assert refused.exit_code == 2 and "add `--overwrite`" in refused.stderr and contents(other) == before
    assert _run(*arguments, "--overwrite").exit_code == 0 and contents(other) != before
    assert _run(*arguments).exit_code == 0


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
    ):
        path = tmp_path / "config.yml"
        path.write_text(json.dumps(cfg | changed))
        result = _run("merge", path)
        assert result.exit_code == 2 and message in result.stderr


def test_a_configuration_without_a_folder_stands_for_the_one_that_axolotl_trains_into(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base", tiny_llama)
    config = tmp_path / "config.yml"
    config.write_text(f"base_model: {base}\nadapter: spft\n")
    result = _run("merge", config)
    assert result.exit_code == 2 and "model-out" in result.stderr, result.output
    adapter = save_adapter(tmp_path / "model-out", base)
    result = _run("merge", config)
    assert result.exit_code == 0 and "values of model-out merged" in result.stdout, result.output
    assert (adapter / "merged/model.safetensors.index.json").is_file()
    # what a run goes on from, as long as it has nothing of its own
    first = save_adapter(tmp_path / "first", base, 1)
    config.write_text(f"base_model: {base}\nadapter: spft\nlora_model_dir: {first}\n")
    assert "values of model-out merged" in _run("merge", config).stdout
    (adapter / "adapter_model.safetensors").unlink()
    assert f"values of {first} merged" in _run("merge", config).stdout


def _save_with_tokenizer(folder, base, template, seed=0):
    save_adapter(folder, base, seed)
    (folder / "tokenizer_config.json").write_text('{"of": "run"}')
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_sum_has_the_tokenizer_of_the_first_adapter_and_tells_whose_differ(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    plain = save_adapter(tmp_path / "plain", base, 2)
    first, other = (_save_with_tokenizer(tmp_path / name, base, name, seed) for seed, name in enumerate("ab"))
    output = tmp_path / "sum"
    result = _run("combine", plain, first, other, "--output", output)
    assert f"Tokenizer and chat template: those of {first}; others are in {other}" in result.stdout, result.output
    assert (output / "chat_template.jinja").read_text() == "a"
    _run("merge", output, "--base", base)
    assert (output / "merged/chat_template.jinja").read_text() == "a"
    # what an earlier sum has left is of another tokenizer
    (other / "chat_template.jinja").unlink()
    report = json.loads(_run("combine", other, "--density", 0.05, "--output", output, "--json").stdout)
    assert (report["tokenizer_of"], report["other_tokenizers"]) == (str(other), [])
    assert not (output / "chat_template.jinja").exists()
    assert json.loads(_run("combine", plain, "--output", tmp_path / "p", "--json").stdout)["tokenizer_of"] is None


def test_what_is_extracted_or_converted_keeps_its_tokenizer(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = _save_with_tokenizer(tmp_path / "run", base, "trained with")
    tuned = tmp_path / "run/merged"
    assert _run("merge", adapter, "--base", base).exit_code == 0
    (tuned / "preprocessor_config.json").write_text("{}")
    _run("extract", "--base", base, "--tuned", tuned, "--density", 0.1, "--output", tmp_path / "x")
    _run("convert", adapter, "--output", tmp_path / "shira")
    _run("convert", tmp_path / "shira", "--base", base, "--output", tmp_path / "back")
    for name in ("x", "shira", "back"):
        assert (tmp_path / name / "chat_template.jinja").read_text() == "trained with"
        assert (tmp_path / name / "tokenizer_config.json").read_text() == '{"of": "run"}'
    assert (tmp_path / "x/preprocessor_config.json").exists()


def test_files_of_a_model_in_the_folder_of_the_output_are_not_removed(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = save_adapter(tmp_path / "run", base)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert _run("combine", adapter, "--output", base).exit_code == 0
    assert (base / "chat_template.jinja").exists()


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = save_adapter(tmp_path / "run", base)
    (tmp_path / "file").write_text("")
    output = tmp_path / "file/out"
    for arguments in (
        ("combine", adapter),
        ("convert", adapter),
        # the models are not looked for either
        ("extract", "--base", tmp_path / "absent", "--tuned", tmp_path / "absent", "--density", 0.1),
    ):
        result = _run(*arguments, "--output", output)
        assert result.exit_code == 2 and result.stderr.startswith(f"Error: nothing can be written to {output}")


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", "bf16"])
def test_a_base_named_beside_the_configuration_stands_for_its_own(tmp_path, key):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = save_adapter(tmp_path / "run", base)
    run = {"adapter": "spft", "output_dir": str(adapter), "bf16": True, key: True}
    for name, model in (("here", base), ("elsewhere", tmp_path / "no/such/model")):
        (tmp_path / f"{name}.yml").write_text(json.dumps(run | {"base_model": str(model), "revision_of_model": "v2"}))
        given = ("--base", base) if name == "elsewhere" else ()
        result = _run("merge", tmp_path / f"{name}.yml", *given, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "here") == contents(tmp_path / "elsewhere")
    arguments = merge_arguments(run | {"base_model": "a/b", "revision_of_model": "v2"}, "config.yml", base=base)
    assert (arguments["base"], arguments["revision"]) == (base, None)
