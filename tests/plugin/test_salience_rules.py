"""Which salience passes are refused before the model loads."""

from __future__ import annotations

import json

import pytest

from axolotl_spft.plugin.salience_rules import problems_of_salience

ZERO3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
ZERO2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}


@pytest.mark.parametrize(
    ("cfg", "options", "key"),
    [
        (ZERO3, {"score_after": 4}, "`score_after: 4` trains before DeepSpeed's engine exists"),
        ({}, {"score_after": 4, "salience": "synflow"}, "`score_after: 4` has no meaning with `salience: synflow`"),
        ({}, {"salience_memory_gib": 2, "salience": "grasp"}, "`salience_memory_gib: 2` cannot be kept"),
        ({"gptq": True}, {"salience": "magnitude"}, "those of a base quantized by GPTQ cannot be read"),
        ({}, {"salience": "nothing"}, "nothing"),
    ],
)
def test_each_rule_is_one_sentence(cfg, options, key):
    (problem,) = problems_of_salience(cfg, options)
    assert key in problem
    # a mask that is there needs no pass
    assert problems_of_salience({**cfg, "lora_model_dir": "adapter"}, options) == []


@pytest.mark.parametrize(
    ("cfg", "options"),
    [
        ({}, {}),
        (ZERO2, {"score_after": 4}),
        (ZERO3, {"salience": "gradient"}),
        ({}, {"salience_memory_gib": 2}),
        ({"gptq": True}, {"salience": "gradient"}),
        # told by the rules of that key
        ({"deepspeed": "nowhere.json"}, {"score_after": 4}),
    ],
)
def test_what_works_is_let_through(cfg, options):
    assert problems_of_salience(cfg, options) == []


def test_several_rules_are_told_together_and_a_saved_mask_needs_none(tmp_path):
    options = {"score_after": 2, "salience": "synflow", "salience_memory_gib": 1}
    assert len(problems_of_salience(ZERO3, options)) == 3
    mask = tmp_path / "mask.safetensors"
    assert len(problems_of_salience(ZERO3, {**options, "mask_path": str(mask)})) == 3
    mask.touch()
    assert problems_of_salience(ZERO3, {**options, "mask_path": str(mask)}) == []


def test_the_bases_own_config_tells_how_it_is_quantized(tmp_path):
    for method, count in (("awq", 1), ("bitsandbytes", 0)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        assert len(problems_of_salience({"base_model": str(tmp_path)}, {"salience": "snip"})) == count
    (tmp_path / "config.json").write_text("no JSON")
    assert problems_of_salience({"base_model": str(tmp_path)}, {"salience": "snip"}) == []
