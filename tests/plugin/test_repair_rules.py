"""What of `repair` is refused before any model loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from axolotl_spft.errors import SpftFileError
from axolotl_spft.plugin.args import check_run
from axolotl_spft.plugin.repair_rules import check_unquantized_weights

RUN = {"adapter": "spft", "base_model": "base", "spft": {"repair": 0.2}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "`repair: 0.2` spends values on the error of a quantized base, and nothing quantizes this one"),
        ({"gptq": True}, "those of a base quantized by GPTQ cannot be read or replaced"),
        ({"load_in_4bit": True, "rl": "dpo", "precompute_ref_log_probs": True}, "`precompute_ref_log_probs: true`"),
        ({"load_in_4bit": True}, None),
        ({"load_in_8bit": True}, None),
        ({"model_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}}, None),
        ({"lora_model_dir": "saved"}, None),
        ({"spft": {"repair": 0}}, None),
    ],
)
def test_bases_that_cannot_be_repaired(changes, problem):
    found = check_run(RUN | changes)
    assert len(found) == bool(problem) and (problem or "") in "".join(found)


def test_a_base_that_was_saved_quantized_needs_the_unquantized_one(tmp_path):
    saved = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    run = RUN | {"base_model": str(tmp_path)}
    (problem,) = check_run(run)
    assert "was saved quantized: name the model before it was quantized in `repair_from`" in problem
    assert check_run(run | {"spft": {"repair": 0.2, "repair_from": "other"}}) == []


def test_the_files_are_looked_for_before_the_model_loads(tmp_path):
    run = RUN | {"base_model": str(tmp_path), "load_in_4bit": True}
    with pytest.raises(SpftFileError, match=r"`repair: 0\.2` reads the unquantized weights, but .* holds neither"):
        check_unquantized_weights(run)
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    check_unquantized_weights(run)
    save_file({"a.weight": torch.zeros(2, 2, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(SpftFileError, match="was saved quantized"):
        check_unquantized_weights(run)
    # which a mask that changes reads again
    resumed = run | {"resume_from_checkpoint": "saved"}
    check_unquantized_weights(resumed)
    with pytest.raises(SpftFileError, match="was saved quantized"):
        check_unquantized_weights(resumed | {"spft": {"repair": 0.2, "reselect": {"every": 9}}})
    check_unquantized_weights(run | {"lora_model_dir": "saved"})
    check_unquantized_weights(run | {"spft": {"repair": 0.0}})
