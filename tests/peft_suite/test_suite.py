"""The runner of PEFT's own tests: what it makes of SHiRA's cases, and the page of what it counted."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, ShiraConfig
from transformers import AutoModelForCausalLM

from axolotl_spft import SpftConfig
from integration.peft_suite.page import PAGE, RESULTS, page, table
from integration.peft_suite.plugin import add_cases, counterpart
from integration.peft_suite.run import PARTS, counts_of
from integration.peft_suite.stand_ins import write_models


def test_a_case_of_shira_has_one_of_ours():
    name, model, config, options = counterpart(("MLP 4 SHiRA", "MLP", ShiraConfig, {"r": 1, "random_seed": 56}))
    assert (name, model, config) == ("MLP 4 SPFT", "MLP", SpftConfig)
    assert options == {"match_lora_rank": 1, "init_weights": False}
    SpftConfig(**options)
    marked = counterpart(pytest.param(ShiraConfig, {"target_modules": None}, marks=pytest.mark.skip))
    assert marked.values == (SpftConfig, {"target_modules": None, "init_weights": False}) and marked.marks
    assert counterpart(ShiraConfig) is SpftConfig
    assert counterpart((LoraConfig, {"r": 1})) is counterpart(LoraConfig) is counterpart(3) is None


def test_ours_are_put_behind_theirs():
    cases = [(LoraConfig, {}), (ShiraConfig, {"r": 2})]
    add_cases(["config_cls", "config_kwargs"], cases, "test_decoder_models.py", "test_x")
    assert [config for config, _ in cases] == [LoraConfig, ShiraConfig, SpftConfig]
    # where PEFT tests other methods alone
    for file, number in (("test_quantization.py", 2), ("test_other.py", 1)):
        cases = [(LoraConfig, {})]
        add_cases(["config_cls", "config_kwargs"], cases, file, "test_x")
        assert len(cases) == number
    for test, number in (("test_mixed_adapter_batches_mlp", 2), ("test_mixed_adapter_batches_lora_conv2d", 0)):
        cases = []
        add_cases(["test_name", "config0", "config1"], cases, "test_custom_models.py", test)
        assert len(cases) == number


def test_counts_and_their_table():
    records = {
        "tests/a.py::one": {"method": "SPFT", "outcome": "passed"},
        "tests/a.py::Test::two[x-1]": {"method": "SPFT", "outcome": "failed", "said": "ValueError: no | more"},
        "tests/a.py::three": {"method": "SPFT", "outcome": "skipped"},
        "tests/a.py::four": {"method": "SHiRA"},
    }
    found = counts_of(records)
    assert found["SPFT"] == {
        "passed": 1, "failed": 1, "skipped": 1, "not run": 0, "said": {"Test::two[x-1]": "ValueError: no | more"}
    }  # fmt: skip
    results = {"custom": {**found, "peft": "0.20.0"}}
    row = "| custom | 0.20.0 | 1 of 2 | 0 of 0 (1 not run: out of time) | 1, 0 |"
    assert table(results).splitlines()[-1] == row
    assert "| 1 | `two` | ValueError: no \\| more |" in page(results).splitlines()


def test_stand_ins_are_found_by_name(tmp_path, monkeypatch):
    from integration.peft_suite import stand_ins

    # two of them: an OPT and a T5
    few = [(kind, dict(list(configs.items())[:1])) for kind, configs in stand_ins.MODELS[:2]]
    monkeypatch.setattr(stand_ins, "MODELS", few)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_models(tmp_path)
    name = next(iter(few[0][1]))
    model = AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert type(model).__name__ == "OPTForCausalLM"


def test_the_page_shows_the_recorded_counts():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(results) <= set(PARTS)
    assert PAGE.read_text(encoding="utf-8") == page(results), "run `python -m integration.peft_suite.run`"
