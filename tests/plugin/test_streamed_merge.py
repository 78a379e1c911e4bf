"""What `axolotl merge-lora` makes of a run on a quantized base: the files that `axolotl spft merge` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from axolotl.cli.main import merge_lora as axolotl_command
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.streamed_merge import merge_arguments, merge_instead
from axolotl_spft.tools.cli import spft
from axolotl_spft.tuner.state import spft_layers
from tests.checkpoint.saved import contents, make_older, save_adapter, save_base
from tests.checkpoint.test_merge import _NF4, save_repaired
from tests.models import tiny_llama


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", None])
def test_the_base_is_the_one_of_the_training_although_axolotl_puts_its_quantization_off(tmp_path, key):
    base = save_base(tmp_path / "base", tiny_llama)
    make_older(save_adapter(tmp_path / "run", base))
    run = {"adapter": "spft", "base_model": str(base), "output_dir": str(tmp_path / "run"), "bf16": True}
    run |= {key: True} if key else {}
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(run))
    # as `axolotl.cli.merge_lora` hands it on
    cfg = DictDefault(run | {"axolotl_config_path": str(path), "load_in_4bit": False, "load_in_8bit": False})
    cfg._original_load_in_4bit = key == "load_in_4bit"
    assert merge_instead(cfg)
    expected = merge(**merge_arguments(run, str(path)) | {"output": tmp_path / "expected"})
    assert expected["trained_on_quantized"] == (key is not None)
    assert contents(tmp_path / "run/merged") == contents(tmp_path / "expected")
    merge(tmp_path / "run", tmp_path / "plain", base, "base")
    plain, expected = (BaseCheckpoint(tmp_path / name, tiny_llama()) for name in ("plain", "expected"))
    module = "model.layers.0.self_attn.q_proj"
    assert torch.equal(plain.read_matrix(module), expected.read_matrix(module)) == (key is None)


def test_merge_lora_writes_over_what_axolotl_merged_in_memory_before(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    save_adapter(tmp_path / "run", base)
    tiny_llama().save_pretrained(tmp_path / "run/merged")
    run = {"adapter": "spft", "base_model": str(base), "output_dir": str(tmp_path / "run"), "bf16": True}
    assert merge_instead(DictDefault(run))
    merge(tmp_path / "run", tmp_path / "expected", base)
    assert contents(tmp_path / "run/merged") == contents(tmp_path / "expected")


def test_a_configuration_that_was_changed_since_does_not_change_what_was_trained(tmp_path, caplog):
    base = save_base(tmp_path / "base", tiny_llama)
    run = {"adapter": "spft", "base_model": str(base), "output_dir": str(tmp_path / "run"), "load_in_4bit": True}
    save_adapter(tmp_path / "run", base)
    for changed in (True, False):
        caplog.clear()
        arguments = merge_arguments(run | {"load_in_4bit": changed}, "config.yml")
        assert merge(**arguments)["onto"] == "base"
        assert ("config.yml quantizes otherwise than" in caplog.text) == changed
    make_older(tmp_path / "run")
    assert merge(**merge_arguments(run, "config.yml"))["onto"] == "quantized"


@pytest.mark.parametrize("asked", [False, True])
def test_what_repairs_a_base_that_was_saved_quantized_is_merged_onto_the_unquantized_one(tmp_path, asked):
    base = save_base(tmp_path / "base", tiny_llama)
    model = save_repaired(tmp_path / "run", base)
    AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**_NF4), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "saved")
    run = {"adapter": "spft", "base_model": str(tmp_path / "saved"), "output_dir": str(tmp_path / "run"), "bf16": True}
    run |= {"spft": {"repair": 0.5, "repair_from": str(base)}} | ({"load_in_4bit": True} if asked else {})
    assert merge_instead(DictDefault(run | {"load_in_4bit": False, "_original_load_in_4bit": asked}))
    merged = BaseCheckpoint(tmp_path / "run/merged", tiny_llama())
    for name, layer in spft_layers(model.base_model.model).items():
        delta, _ = layer._make_delta(("default",))
        with layer.effective_weight(layer.values("default"), delta) as weight:
            assert torch.equal(merged.read_matrix(name), weight.to(torch.bfloat16))


def save_second_run(folder):
    """The configuration of a run that went on from an adapter, the adapter's folder and the run's own."""
    base = save_base(folder / "base", tiny_llama)
    first, own = (save_adapter(folder / name, base, seed) for name, seed in (("first", 0), ("own", 5)))
    run = {"adapter": "spft", "base_model": str(base), "lora_model_dir": str(first), "output_dir": str(own)}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(run))
    return path, first, own


@pytest.fixture
def merge_lora(monkeypatch):
    """Axolotl's command, without its own reading of the configuration; says what was merged."""
    merged = []

    def do_cli(config, **options):
        cfg = DictDefault(yaml.safe_load(Path(config).read_text()) | options | {"axolotl_config_path": config})
        assert merge_instead(cfg)
        merged.append(cfg.lora_model_dir)

    def call(*arguments):
        CliRunner().invoke(axolotl_command, [*map(str, arguments)], catch_exceptions=False)
        return Path(merged[-1])

    monkeypatch.setattr("axolotl.cli.merge_lora.do_cli", do_cli)
    return call


@pytest.mark.parametrize("finished", [True, False])
def test_of_a_run_that_went_on_from_an_adapter_its_own_is_merged_once_it_has_one(tmp_path, merge_lora, finished):
    path, first, own = save_second_run(tmp_path)
    base = tmp_path / "base"
    if not finished:
        # Axolotl writes the other file before training
        (own / WEIGHTS_FILE).unlink()
    result = CliRunner().invoke(spft, ["merge", str(path)])
    trained = own if finished else first
    assert f" values of {trained} merged" in result.stdout, result.output
    by_command = contents(own / "merged")
    merge(trained, tmp_path / "expected", base)
    assert by_command == contents(tmp_path / "expected")
    assert merge_lora(path) == trained and contents(own / "merged") == by_command
    # which the file does not say
    third = save_adapter(tmp_path / "third", base, 7)
    assert merge_lora(path, "--lora-model-dir", third) == third
    merge(third, tmp_path / "expected", base)
    assert contents(own / "merged") == contents(tmp_path / "expected")


def test_an_adapter_that_merge_lora_names_is_merged_although_the_file_names_it_too(tmp_path, merge_lora):
    path, first, own = save_second_run(tmp_path)
    assert merge_lora(path, "--lora-model-dir", first) == first
    merge(first, tmp_path / "expected")
    assert contents(own / "merged") == contents(tmp_path / "expected")


def test_without_a_command_line_two_finished_adapters_are_one_too_many(tmp_path):
    path, first, own = save_second_run(tmp_path)
    run = yaml.safe_load(path.read_text()) | {"axolotl_config_path": str(path)}
    with pytest.raises(SpftError, match=f"`axolotl spft merge {first}` or `axolotl spft merge {own}`"):
        merge_instead(DictDefault(run))
    assert not (own / "merged").exists()
    third = save_adapter(tmp_path / "third", tmp_path / "base", 7)
    for folder in (third, own):
        cfg = DictDefault(run | {"lora_model_dir": str(folder)})
        assert merge_instead(cfg) and cfg.lora_model_dir == str(folder)
    (own / WEIGHTS_FILE).unlink()
    cfg = DictDefault(run)
    assert merge_instead(cfg) and cfg.lora_model_dir == str(first)


def test_a_run_that_goes_on_in_the_folder_it_came_from_has_one_adapter(tmp_path):
    path, _, own = save_second_run(tmp_path)
    run = yaml.safe_load(path.read_text()) | {"lora_model_dir": f"{own}/"}
    path.write_text(yaml.safe_dump(run))
    assert merge_instead(DictDefault(run | {"axolotl_config_path": str(path)}))
