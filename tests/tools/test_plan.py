"""The command `plan`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from axolotl_spft.tools.cli import spft
from tests.experts import N_EXPERTS, PARAMETERS, tiny_mixtral
from tests.models import tiny_llama

RUN = """
base_model: {base}
plugins: [axolotl_spft.SpftPlugin]
adapter: spft
spft: {{density: 0.05}}
optimizer: sparse_adamw
micro_batch_size: 2
sequence_len: 64
bf16: true
"""


def plan(folder, *arguments: str, base: str, text: str = RUN):
    path = folder / "config.yml"
    path.write_text(text.format(base=base))
    return CliRunner().invoke(spft, ["plan", str(path), *arguments])


@pytest.fixture
def base(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_json_alone_from_a_config_json_without_weights(tmp_path, base):
    result = plan(tmp_path, "--gpus", "2", "--json", base=base)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    linear = sum(m.weight.numel() for n, m in tiny_llama().named_modules() if n.endswith("_proj"))
    assert found["estimate"]["entries"] == linear
    assert found["estimate"]["values"] == round(0.05 * linear)
    assert found["estimate"]["base"] == 2 * sum(p.numel() for p in tiny_llama().parameters())
    assert found["estimate"]["fits"] is True and found["changes"] == []
    assert (found["run"]["engine"], found["run"]["rows"]) == ("ddp", 2)
    assert set(found["alternatives"]) == {"single", "ddp", "zero1", "zero2", "zero3"}


def test_experts_are_counted_with_the_dense_gradient_of_one_parameter(tmp_path):
    tiny_mixtral(num_hidden_layers=1, hidden_size=96, intermediate_size=700).config.save_pretrained(tmp_path / "base")
    experts = RUN.replace("0.05", f"0.05, target_parameters: [{', '.join(PARAMETERS)}]")
    without, found = (
        json.loads(plan(tmp_path, "--json", base=str(tmp_path / "base"), text=text).stdout)["estimate"]
        for text in (RUN, experts)
    )
    assert found["entries"] - without["entries"] == N_EXPERTS * 3 * 700 * 96
    # gate and up of all experts in bf16, beside what their products keep of the tokens
    assert found["activations"] - without["activations"] >= 2 * N_EXPERTS * 2 * 700 * 96
    assert found["base"] == without["base"]


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path):
    result = plan(tmp_path, "--gpu-memory", "24", base="meta-llama/Llama-3.1-8B", text=RUN + "sequence_len: 8192\n")
    assert result.exit_code == 0, result.output
    assert "shape llama-8b, as meta-llama/Llama-3.1-8B's config.json cannot be had here" in result.output
    assert "does not fit in 24 GiB" in result.output
    assert "  gradient_checkpointing: true" in result.output
    assert "  load_in_4bit: true" in result.output or "  load_in_8bit: true" in result.output


@pytest.mark.parametrize(
    ("base", "text", "arguments", "message"),
    [
        ("nobody/nothing", RUN, (), "`base_model: nobody/nothing`: its config.json cannot be had"),
        ("x", RUN, ("--shape", "llama-9b"), "`--shape llama-9b` is neither a file nor one of"),
        ("x", "adapter: lora", (), "has no `adapter: spft`"),
        ("x", "a: [", (), "is not valid YAML"),
        ("x", RUN.replace("0.05", "2"), (), "`density: 2` must be a number in (0, 1]"),
        ("x", RUN.replace("density: 0.05", "target_modules: [nothing]"), ("--shape", "llama-45m"), "matches no module"),
    ],
)
def test_mistakes_are_one_line(tmp_path, base, text, arguments, message):
    result = plan(tmp_path, *arguments, base=base, text=text)
    assert result.exit_code != 0
    assert message in result.output and "Traceback" not in result.output


def test_unknown_arguments_and_files_that_are_not_there_are_usage_errors(tmp_path, base):
    assert plan(tmp_path, "--nothing", base=base).exit_code == 2
    assert CliRunner().invoke(spft, ["plan", str(tmp_path / "none.yml")]).exit_code == 2
    assert "--gpu-memory" in CliRunner().invoke(spft, ["plan", "--help"]).output
