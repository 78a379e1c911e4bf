"""Runs with re-selections that cannot work, told by the configuration alone."""

from __future__ import annotations

import pytest

from axolotl_spft.plugin.reselect_run import problems_of_reselect

OPTIONS = {"reselect": {"every": 4, "collect": 3}}
GOOD = {"optimizer": "sparse_adamw", "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    "cfg",
    [
        GOOD,
        # of either key of Axolotl's for the micro-batches of a step
        {"optimizer": "sparse_adamw_8bit", "batch_size": 6, "micro_batch_size": 2},
        {"gradient_accumulation_steps": 3, "optimizer": None},
        GOOD | {"deepspeed": {"zero_optimization": {"stage": 2}}},
        # nothing is trained
        {"inference": True},
        {"merge_lora": True, "torch_compile": True},
    ],
)
def test_good_runs_pass(cfg):
    assert problems_of_reselect(cfg, OPTIONS) == []
    assert problems_of_reselect({"torch_compile": True}, {"reselect": None}) == []


@pytest.mark.parametrize(
    ("cfg", "options", "message"),
    [
        (
            {"gradient_accumulation_steps": None, "batch_size": 4, "micro_batch_size": 2},
            {},
            "`reselect.collect: 3` is more than the 2 micro-batches",
        ),
        ({"gradient_accumulation_steps": None}, {}, "is more than the 1 micro-batches"),
        ({"torch_compile": True}, {}, "leave `torch_compile` out"),
        ({"optimizer": "adafactor"}, {}, "which `adafactor` has not"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, {}, "does not know DeepSpeed's optimizer at stage 0"),
        ({}, {"salience": "random"}, "`salience: random` needs no gradient"),
    ],
)
def test_what_cannot_work_is_one_sentence(cfg, options, message):
    (problem,) = problems_of_reselect(GOOD | cfg, OPTIONS | options)
    assert message in problem
