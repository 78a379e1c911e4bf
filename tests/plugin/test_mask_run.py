"""`axolotl spft mask`: what it refuses before anything loads; tests/e2e shows with the real command that it works."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from axolotl_spft.tools.cli import spft

WHOLE = {"adapter": "spft", "base_model": "no/such/model", "spft": {"density": 0.1}}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "does not exist"),
        ("a: [", "no readable YAML"),
        ("- 1", "a mask belongs to `adapter: spft`"),
        (yaml.safe_dump(WHOLE | {"adapter": "lora"}), "a mask belongs to `adapter: spft`"),
        (yaml.safe_dump(WHOLE | {"lora_model_dir": "out/run"}), "`lora_model_dir: out/run` has its mask already"),
        (yaml.safe_dump(WHOLE | {"use_ray": True}), "`use_ray: true` starts trainings only"),
    ],
)
def test_a_configuration_without_a_mask_to_compute_is_one_line_and_status_2(tmp_path, text, part):
    config, output = tmp_path / "config.yml", tmp_path / "new/mask.safetensors"
    if text is not None:
        config.write_text(text)
    result = CliRunner().invoke(spft, ["mask", str(config), "-o", str(output)])
    assert result.exit_code == 2 and part in result.output and result.output.count("\n") == 1
    assert not output.parent.exists()


def test_a_file_is_never_overwritten(tmp_path):
    config, output = tmp_path / "config.yml", tmp_path / "mask.safetensors"
    config.write_text(yaml.safe_dump(WHOLE))
    output.write_bytes(b"dear")
    result = CliRunner().invoke(spft, ["mask", str(config), "-o", str(output)])
    assert result.exit_code == 2 and f"{output} exists" in result.output and output.read_bytes() == b"dear"


def test_every_problem_of_the_configuration_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yml"
    options = WHOLE | {"plugins": ["axolotl_spft.SpftPlugin"], "spft": {"densty": 1, "density": 2}, "output_dir": "run"}
    options |= {"datasets": [{"path": "train.jsonl", "type": "alpaca"}], "micro_batch_size": 1, "num_epochs": 1}
    options |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    config.write_text(yaml.safe_dump(options))
    result = CliRunner().invoke(spft, ["mask", str(config), "-o", "mask.safetensors"])
    assert result.exit_code == 2, result.output
    error = result.output.splitlines()[-1]
    assert "unknown key `densty`" in error and "`density: 2` must be a number in (0, 1]" in error
    assert {path.name for path in tmp_path.iterdir()} == {"config.yml"}
