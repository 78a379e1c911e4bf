"""What an adapter's file records of the base that its values were trained on."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.tuner.record import read_record
from axolotl_spft.tuner.trained_on import common
from tests.checkpoint.saved import make_older
from tests.models import tiny_llama, with_adapter
from tests.quantizers import SETTINGS, load_quantized

OPTIONS = {"target_modules": ["q_proj", "lm_head"]}


def recorded(folder) -> dict:
    return read_record(folder / WEIGHTS_FILE)["trained_on"]


@pytest.mark.parametrize("kind", [*SETTINGS, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_tells_the_dtype_of_the_base_and_how_it_was_quantized(tmp_path, kind, dtype):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = (
        load_quantized(tmp_path / "base", kind, dtype)
        if kind
        else AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    )
    with_adapter(model, **OPTIONS).save_pretrained(tmp_path)
    found = recorded(tmp_path)
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert SETTINGS[kind].items() <= found["quantization"].items() if kind else found["quantization"] is None


def test_an_adapter_that_is_only_read_keeps_its_record_and_one_that_is_trained_on_has_a_new_one(tmp_path):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    with_adapter(load_quantized(tmp_path / "base", "nf4"), **OPTIONS).save_pretrained(tmp_path / "first")
    first = recorded(tmp_path / "first")
    for trained in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=trained).save_pretrained(tmp_path / "again")
        new = {"dtype": "bfloat16", "quantization": None}
        assert recorded(tmp_path / "again") == (new if trained else first) != {}
    make_older(tmp_path / "first")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "first")
    model.save_pretrained(tmp_path / "older")
    assert recorded(tmp_path / "older") == {}


def test_a_sum_was_trained_on_what_all_of_its_adapters_were(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    for seed, (name, kind) in enumerate({"a": "nf4", "b": "nf4", "c": "int8"}.items()):
        with_adapter(load_quantized(tmp_path / "base", kind), seed, **OPTIONS).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(load_quantized(tmp_path / "base", "fp4"), tmp_path / "a", adapter_name="a")
    for name in "bc":
        model.load_adapter(tmp_path / name, name)
    for names, expected in (("ab", recorded(tmp_path / "a")), ("ac", {})):
        model.add_weighted_adapter(list(names), [1.0, 0.5], names)
        model.save_pretrained(tmp_path, selected_adapters=[names])
        assert recorded(tmp_path / names) == expected


def test_adapters_of_two_commits_have_all_but_the_commit_in_common():
    first = {"dtype": "float32", "quantization": None}
    one, other = ({**first, "commit": commit * 40} for commit in "ab")
    assert common([one, one]) == one and common([first, first]) == first and common([{}, {}]) == {}
    assert common([one, other]) == common([one, first]) == common([first, one]) == first
    assert common([one, {**one, "dtype": "bfloat16"}]) == common([one, {}]) == common([{}, one]) == {}
