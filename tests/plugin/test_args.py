"""Rules of a whole Axolotl configuration."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from axolotl_spft import SpftArgs
from axolotl_spft.config import option_names
from axolotl_spft.plugin.args import check_run

GOOD = {"adapter": "spft", "optimizer": "sparse_adamw", "output_dir": "out"}


@pytest.mark.parametrize("options", [None, {}, {"density": 0.01}, {"num_values": 10, "target_modules": ["q_proj"]}])
def test_good_configurations_pass(options):
    assert check_run({**GOOD, "spft": options}) == []
    assert SpftArgs(**GOOD, spft=options).spft == options


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"adapter": "lora", "spft": {}}, ["the block `spft` needs `adapter: spft`", "sparse_adamw` needs"]),
        ({"spft": 3}, ["`spft: 3` must be a block of keys"]),
        ({"spft": {"density": 3}}, ["`density: 3` must be a number in (0, 1]"]),
        ({"spft": {"reselect": {}}}, ["unknown key `reselect`", ", ".join(option_names())]),
        (
            {"optimizer": "sparse_adam"},
            ["`optimizer: sparse_adam` must be sparse_adamw or sparse_adamw_8bit or a"],
        ),
        ({"lora_r": 8, "peft_use_dora": True}, ["`lora_r: 8` has no meaning", "set `spft.match_lora_rank`", "dora"]),
        ({"load_in_4bit": True, "load_in_8bit": True}, ["exclude each other"]),
        ({"merge_method": "memory_efficient"}, ["write `merge_method: legacy`"]),
        ({"inference": True}, ["add `lora_model_dir: out`"]),
        ({"deepspeed": "no_such.json"}, ["`deepspeed: no_such.json` cannot be read", "integration/deepspeed"]),
        ({"fsdp_config": {"a": 1}, "fsdp_version": 2}, ["`fsdp_version: 2`: leave it out", "ZeRO-3 instead"]),
        ({"tensor_parallel_size": 2}, ["`tensor_parallel_size: 2`: leave it out", "data-parallel only"]),
        ({"unfrozen_parameters": ["lm_head"]}, ["set `spft.modules_to_save`"]),
    ],
)
def test_problems_name_the_key_and_the_remedy(changes, parts):
    text = "; ".join(check_run({**GOOD, **changes}))
    assert all(part in text for part in parts), text
    with pytest.raises(ValidationError) as caught:
        SpftArgs(**{**GOOD, **changes})
    assert all(problem in str(caught.value) for problem in check_run({**GOOD, **changes}))


def test_all_problems_come_together():
    problems = check_run({**GOOD, "spft": {"density": 3, "scope": "x", "zzz": 1}, "lora_r": 8, "fsdp": ["full_shard"]})
    assert len(problems) == 5


def test_other_adapters_are_left_alone():
    assert check_run({"adapter": "lora", "lora_r": 8, "optimizer": "adamw_torch", "deepspeed": "zero3.json"}) == []
    assert check_run({}) == []
