"""Keys of Axolotl with values of a wrong kind, read before Axolotl has checked them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from axolotl_spft.plugin.args import check_run
from axolotl_spft.tools.cli import spft

GOOD = {"adapter": "spft", "optimizer": "sparse_adamw", "base_model": "base", "output_dir": "out"}
WRONG = [
    ({"micro_batch_size": "two"}, "`micro_batch_size: two` must be a whole number"),
    ({"sequence_len": "2k"}, "`sequence_len: 2k` must be a whole number"),
    ({"gradient_accumulation_steps": 1.5}, "`gradient_accumulation_steps: 1.5` must be a whole number"),
    ({"batch_size": "big", "spft": {"reselect": {"every": 5}}}, "`batch_size: big` must be a whole number"),
    ({"micro_batch_size": True}, "`micro_batch_size: True` must be a whole number"),
    ({"plugins": 3}, "`plugins: 3` must be a list"),
    ({"plugins": "axolotl_spft.SpftPlugin"}, "`plugins: axolotl_spft.SpftPlugin` must be a list"),
    ({"base_model": ["a", "b"]}, "`base_model: ['a', 'b']` must be one name or folder"),
    ({"output_dir": 7}, "`output_dir: 7` must be one name or folder"),
    ({"bnb_config_kwargs": "nf4", "load_in_4bit": True}, "`bnb_config_kwargs: nf4` must be a block of keys"),
    ({"model_kwargs": ["a"]}, "`model_kwargs: ['a']` must be a block of keys"),
    ({"model_kwargs": {"quantization_config": 4}}, "`model_kwargs: {quantization_config: 4}` must be a block of keys"),
    ({"overrides_of_model_config": ["a"]}, "`overrides_of_model_config: ['a']` must be a block of keys"),
    ({"gradient_checkpointing_kwargs": True}, "`gradient_checkpointing_kwargs: True` must be a block of keys"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}},
        '"offload_optimizer": cpu must be a block of keys',
    ),
    ({"deepspeed": {"zero_optimization": {"stage": [2]}}}, '"stage": [2] must be 0, 1, 2 or 3'),
    ({"spft": {"density": 10**400}}, "must be a number in (0, 1]"),
    ({"spft": {"salience_memory_gib": 10**400}}, "must be a number above 0"),
]


@pytest.mark.parametrize("changes, message", WRONG)
def test_a_value_of_a_wrong_kind_is_one_sentence(tmp_path, changes, message):
    assert any(message in problem for problem in check_run({**GOOD, **changes})), check_run({**GOOD, **changes})
    path = tmp_path / "config.yml"
    path.write_text(json.dumps({**GOOD, **changes}))
    result = CliRunner().invoke(spft, ["plan", str(path), "--shape", "llama-45m"])
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("changes, message", [each for each in WRONG if each[0].keys() & {
    "base_model", "output_dir", "bnb_config_kwargs", "model_kwargs"}])  # fmt: skip
def test_a_merge_tells_them_too(tmp_path, changes, message):
    path = tmp_path / "config.yml"
    path.write_text(json.dumps({**GOOD, **changes}))
    result = CliRunner().invoke(spft, ["merge", str(path)])
    assert result.exit_code == 2 and f"{path}: {message}" in result.stderr, result.output


def test_they_come_with_the_problems_of_the_block_and_with_each_other():
    problems = check_run({**GOOD, "micro_batch_size": "two", "plugins": 3, "spft": {"density": 3}})
    assert len(problems) == 3


def test_what_axolotl_takes_passes():
    taken = {"micro_batch_size": "2", "batch_size": 4.0, "sequence_len": None, "bnb_config_kwargs": None}
    taken |= {"plugins": ["axolotl_spft.SpftPlugin"], "gradient_checkpointing_kwargs": {}, "lora_model_dir": None}
    assert check_run({**GOOD, **taken, "spft": {"reselect": {"every": 5, "collect": 2}}}) == []


def test_the_optimizer_of_another_adapter_is_no_concern():
    assert check_run({"adapter": "lora", "optimizer": ["a"]}) == []
