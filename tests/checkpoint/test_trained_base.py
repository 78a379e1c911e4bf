"""The merge of an adapter alone is that of its run; of an older one it says what it assumes."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.extract import extract
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.report import describe_merge
from axolotl_spft.checkpoint.trained_base import recorded_base
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.tools.cli import spft
from axolotl_spft.tuner.state import spft_layers
from tests.checkpoint.saved import make_older, save_adapter, save_base
from tests.models import tiny_llama, with_adapter
from tests.quantizers import SETTINGS, load_quantized

KNOWN, ASSUMED = "the weights that training computed with", "bfloat16 is assumed"


def _base(tmp_path):
    """In float32, where a run in bfloat16 has other codes."""
    return save_base(
        tmp_path / "base", lambda dtype: tiny_llama(dtype, hidden_size=64, intermediate_size=128), torch.float32, "5GB"
    )


def _run_of(tmp_path, base, kind="nf4", seed=0, name="run"):
    """An adapter of a run in bfloat16, and the matrices that the run computes with."""
    model = with_adapter(load_quantized(base, kind, torch.bfloat16), seed, density=0.01)
    model.save_pretrained(tmp_path / name)
    trained = {}
    for module, layer in spft_layers(model.base_model.model).items():
        at = positions(layer.mask("default"), layer.in_features)
        trained[module] = layer.read_weight().clone()
        trained[module].view(-1)[at] += layer.values("default").detach()
    return tmp_path / name, trained


def _holds(folder, trained) -> bool:
    merged = AutoModelForCausalLM.from_pretrained(folder)
    return all(torch.equal(merged.get_submodule(name).weight, weight.float()) for name, weight in trained.items())


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_alone_is_merged_as_its_run_computed(tmp_path, kind):
    base = _base(tmp_path)
    adapter, trained = _run_of(tmp_path, base, kind)
    report = merge(adapter, tmp_path / "merged", base)
    assert _holds(tmp_path / "merged", trained) and f"{KNOWN}: 0.000%" in describe_merge(report)
    assert report["trained_on"]["told_by"] == "record" and report["trained_on"]["dtype"] == "bfloat16"
    for options in ({}, {"quantization": SETTINGS[kind]}, {"dtype": torch.bfloat16}):
        assert merge(adapter, tmp_path / "merged", base, **options)["files_written"] == [], options


def test_of_an_older_adapter_it_is_said_what_was_assumed(tmp_path):
    base = _base(tmp_path)
    adapter, trained = _run_of(tmp_path, base)
    make_older(adapter)
    command = ["merge", str(adapter), "--base", str(base)]
    kind = "with double quantization: 0.000%"
    nf4 = ["--quantization", "nf4"]
    for number, (options, right, said) in enumerate(
        [
            (nf4, True, [f"nf4 of bfloat16 {kind}", ASSUMED]),
            ([*nf4, "--dtype", "bfloat16"], True, [f"nf4 of bfloat16 {kind}"]),
            ([*nf4, "--dtype", "float32"], False, [f"nf4 of float32 {kind}"]),
            ([], False, ["The adapter does not record how its base was quantized: not at all is assumed"]),
            (["--quantization", "none"], False, []),
        ]
    ):
        output = tmp_path / f"{number}"
        result = CliRunner().invoke(spft, [*command, "--output", str(output), *options])
        assert result.exit_code == 0, result.output
        assert all(part in result.stdout for part in said) and KNOWN not in result.stdout
        assert (ASSUMED in result.stdout) == (ASSUMED in said)
        assert _holds(output, trained) == right, options
    result = CliRunner().invoke(spft, [*command, "--dtype", "float16"])
    assert result.exit_code == 2 and "`--dtype float16` tells what a base was before" in result.stderr


def test_what_a_user_tells_is_done_and_set_against_what_is_recorded(tmp_path):
    base = _base(tmp_path)
    adapter, _ = _run_of(tmp_path, base)
    for told, said in (
        ({"quantization": SETTINGS["int8"]}, "int8 of bfloat16"),
        ({"dtype": torch.float32}, "nf4 of float32"),
        ({"quantization": {}}, ""),
    ):
        text = describe_merge(merge(adapter, tmp_path / "merged", base, **told))
        assert "records another base, nf4 of bfloat16 with double quantization" in text and said in text
        assert KNOWN not in text
    plain = save_adapter(tmp_path / "plain", base)
    text = describe_merge(merge(plain, tmp_path / "merged", base, quantization=SETTINGS["nf4"]))
    assert "records another base, float32, not quantized" in text and ASSUMED in text


def test_a_base_that_cannot_be_quantized_again(tmp_path):
    base = _base(tmp_path)
    adapter = read_adapter(save_adapter(tmp_path / "run", base))
    adapter.record["trained_on"] = {"dtype": "float16", "quantization": {"quant_method": "gptq"}}
    write_adapter(tmp_path / "run", adapter)
    report = merge(tmp_path / "run", tmp_path / "merged", base)
    text = describe_merge(report)
    assert (
        report["onto"] == "base"
        and "Not known is the difference from a base quantized by gptq" in text
        and KNOWN not in text
    )
    with pytest.raises(SpftFileError, match="quantized by gptq, which cannot be done again here: leave the option out"):
        merge(tmp_path / "run", tmp_path / "merged", base, "quantized")


def test_what_is_made_of_files_keeps_what_they_record(tmp_path):
    base = _base(tmp_path)
    first, other = (_run_of(tmp_path, base, "nf4", seed, f"{seed}")[0] for seed in (0, 1))
    plain = save_adapter(tmp_path / "plain", base)
    for folders, density, expected in (
        ([first, other], None, recorded_base(first)),
        ([first], 0.005, recorded_base(first)),
        ([first, plain], None, {}),
    ):
        write_adapter(tmp_path / "sum", combine([read_adapter(each) for each in folders], density=density)[0])
        assert recorded_base(tmp_path / "sum") == expected
    merge(plain, tmp_path / "tuned", base)
    write_adapter(tmp_path / "extracted", extract(base, tmp_path / "tuned", 1.0)[0])
    assert recorded_base(tmp_path / "extracted") == {"dtype": "float32", "quantization": None}
