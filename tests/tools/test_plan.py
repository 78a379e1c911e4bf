"""The command `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from peft import get_peft_model

from axolotl_spft import SpftConfig
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tools.cli import spft
from tests.experts import N_EXPERTS, PARAMETERS, tiny_mixtral
from tests.families import FAMILIES
from tests.hub import fill_cache
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


def _edit_config(base, **changes) -> None:
    path = Path(base, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _estimate(folder, base, more="", *arguments):
    result = plan(folder, "--json", *arguments, base=base, text=RUN + more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["estimate"]


@pytest.mark.parametrize("key", ["overrides_of_model_config", "model_config"])
def test_what_the_run_changes_of_the_config_is_planned(tmp_path, base, key):
    smaller = f"{key}: {{{{num_hidden_layers: 1, intermediate_size: 20}}}}\n"
    found = [_estimate(tmp_path, base, smaller), _estimate(tmp_path, "absent", smaller, "--shape", base)]
    tiny_llama(num_hidden_layers=1, intermediate_size=20).config.save_pretrained(base)
    assert found == [_estimate(tmp_path, base)] * 2


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
def test_the_commit_that_will_be_trained_is_planned(tmp_path, base, key, monkeypatch):
    tiny_llama(num_hidden_layers=1).config.save_pretrained(tmp_path / "other")
    commits = {"main": Path(base), "v2": tmp_path / "other"}
    fill_cache(tmp_path / "hub", "of/us", commits, monkeypatch)
    assert _estimate(tmp_path, "of/us") == _estimate(tmp_path, base)
    assert _estimate(tmp_path, "of/us", f"{key}: v2\n") == _estimate(tmp_path, str(tmp_path / "other"))


def test_only_a_run_that_has_its_mask_is_planned_without_a_salience_pass(tmp_path, base):
    there, absent = tmp_path / "mask.safetensors", tmp_path / "absent"
    there.write_bytes(b"")
    run, with_mask, without = (RUN.replace("0.05", f"0.05{more}") for more in ("", f", mask_path: {there}",
                                                                               f", mask_path: {absent}"))  # fmt: skip
    peaks = [
        json.loads(plan(tmp_path, "--json", base=base, text=text + more).stdout)["estimate"]["salience_peak"]
        for text, more in ((run, ""), (without, ""), (with_mask, ""), (run, f"lora_model_dir: {tmp_path}\n"))
    ]
    assert peaks[0] == peaks[1] > 0 == peaks[2] == peaks[3]


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "load_in_4bit: true"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit: true"),
        ({"quant_method": "gptq", "bits": 4}, "load_in_4bit: true"),
        ({"quant_method": "gptq", "bits": 3}, "load_in_4bit: true"),
        ({"quant_method": "awq", "bits": 4}, "load_in_4bit: true"),
        ({"quant_method": "eetq"}, "load_in_8bit: true"),
        ({"quant_method": "of_tomorrow"}, ""),
    ],
)
def test_a_base_that_was_saved_quantized_is_planned_as_it_is(tmp_path, base, saved, asked):
    expected = _estimate(tmp_path, base, f"{asked}\n")
    for_models = f"model_kwargs: {{quantization_config: {json.dumps(saved)}}}\n".replace("{", "{{").replace("}", "}}")
    assert _estimate(tmp_path, base, for_models) == expected
    _edit_config(base, quantization_config=saved)
    # whatever is asked for, transformers loads it as it is
    for more in ("", "load_in_8bit: true\n"):
        assert _estimate(tmp_path, base, more) == expected
    text = plan(tmp_path, "--gpu-memory", "0.001", base=base).output
    assert "does not fit" in text and "load_in_" not in text
    assert ("is not known" in text) == (saved["quant_method"] == "of_tomorrow")


def test_8_bits_without_bf16_are_run_in_float16(tmp_path, base):
    float16, without = (
        _estimate(tmp_path, base, f"load_in_8bit: true\n{more}")
        for more in ("fp16: true\nbf16: false\n", "bf16: false\n")
    )
    assert without == float16


_CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
""",
}


def test_a_model_of_its_own_code_is_planned_where_that_is_trusted(tmp_path, base):
    expected = _estimate(tmp_path, base)
    for name, code in _CODE.items():
        Path(base, name).write_text(code)
    of_code = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    _edit_config(base, model_type="mine", auto_map=of_code)
    assert _estimate(tmp_path, base, "trust_remote_code: true\n") == expected
    for arguments in ((), ("--shape", base)):
        result = plan(tmp_path, *arguments, base=base)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
        assert "write `trust_remote_code: true`" in result.stderr
    named = plan(tmp_path, "--shape", "llama-45m", base=base)
    assert named.exit_code == 0, named.output


def test_the_parts_that_see_are_counted(tmp_path):
    model = next(family for family in FAMILIES if family.images).make()
    model.config.save_pretrained(tmp_path / "base")
    result = plan(tmp_path, "--json", base=str(tmp_path / "base"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    layers = adapted_layers(get_peft_model(model, SpftConfig(density=0.05)))
    assert any("vision_tower" in name for name in layers)
    assert found["matrices"] == len(layers)
    assert found["estimate"]["entries"] == sum(each.out_features * each.in_features for each in layers.values())
    assert found["estimate"]["base"] == 2 * sum(
        p.numel() for name, p in model.named_parameters() if "spft_" not in name
    )
    # a token of text goes through the text model alone
    text_alone = RUN.replace("0.05", "0.05, exclude_modules: '.*(vision_tower|multi_modal_projector).*'")
    without = json.loads(plan(tmp_path, "--json", base=str(tmp_path / "base"), text=text_alone).stdout)
    assert without["matrices"] < found["matrices"]
    assert without["estimate"]["activations"] == pytest.approx(found["estimate"]["activations"], rel=0.02)
    assert len(found["remarks"]) == 1 and "what images and sounds need in a pass is not" in found["remarks"][0]
    assert found["remarks"][0] in plan(tmp_path, base=str(tmp_path / "base")).output


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
