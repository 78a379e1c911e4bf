"""Which saved adapters a run can go on from, and what it takes from a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.inspection.reading import read_sparse_file
from axolotl_spft.plugin.saved_adapter import check_lora_model_dir, options_not_read
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.saved_adapter import copy_to_reference, has_reference, install_checkpoint_mask
from axolotl_spft.tuner.state import mask_checksum, slots_of
from tests.models import logits, tiny_llama

MADE_WITH = {"density": 0.05, "salience": "magnitude", "scope": "global", "samples": 7, "seed": 3}


@pytest.fixture
def checkpoint(tmp_path):
    model = get_peft_model(tiny_llama(), SpftConfig(**MADE_WITH))
    select_mask(model, None)
    model.save_pretrained(tmp_path / "checkpoint-2")
    return model, str(tmp_path / "checkpoint-2")


@pytest.fixture
def lora(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    return str(tmp_path / "lora")


def checksum(model) -> str:
    return mask_checksum(slots_of(adapted_layers(model), "default"))


def test_the_mask_of_a_checkpoint_and_what_made_it(checkpoint):
    made, folder = checkpoint
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience="random", scope="row", samples=9, seed=8))
    install_checkpoint_mask(model, folder)
    assert checksum(model) == checksum(made)
    config, recorded = model.peft_config["default"], made.peft_config["default"]
    assert {name: getattr(config, name) for name in MADE_WITH} == MADE_WITH
    assert (config.nnz, config.mask_source) == (recorded.nnz, recorded.mask_source)


def test_what_the_file_records_of_its_mask_counts_not_the_config_beside_it(checkpoint, tmp_path):
    """Also for a mask that is taken from an adapter's file by `mask_path`, and for what `inspect` shows."""
    made, folder = checkpoint
    path = tmp_path / "checkpoint-2" / "adapter_config.json"
    other = {"salience": "random", "mask_source": {"salience": "random"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    source = made.peft_config["default"].mask_source
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05))
    install_checkpoint_mask(model, folder)
    config = model.peft_config["default"]
    assert (config.salience, config.mask_source) == ("magnitude", source)
    weights = str(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    model = get_peft_model(tiny_llama(), SpftConfig(**MADE_WITH | {"mask_path": weights}))
    select_mask(model, None)
    assert model.peft_config["default"].mask_source == source
    assert read_sparse_file(tmp_path / "checkpoint-2", None).source == source
    # an older file
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if "record" not in key}, weights, {"format": "pt"})
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05))
    install_checkpoint_mask(model, folder)
    assert model.peft_config["default"].mask_source == {"salience": "random"}


def test_another_budget_than_the_checkpoints_is_refused(checkpoint):
    made, folder = checkpoint
    nnz = made.peft_config["default"].nnz
    install_checkpoint_mask(get_peft_model(tiny_llama(), SpftConfig(num_values=nnz)), folder)
    for option, value in {"density": 0.2, "num_values": nnz + 1, "match_lora_rank": 1}.items():
        model = get_peft_model(tiny_llama(), SpftConfig(**{option: value}))
        with pytest.raises(SpftError, match=f"holds {nnz:,} values, but `{option}: {value}`.*`num_values: {nnz}`"):
            install_checkpoint_mask(model, folder)
        assert all(layer.mask("default").nnz == 0 for layer in adapted_layers(model).values())


def test_other_targets_than_the_checkpoints_are_refused_without_harm_to_it(checkpoint):
    _, folder = checkpoint
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, target_modules=["q_proj"]))
    with pytest.raises(SpftFileError, match=r"no such targeted module.*Restore `target_modules`.*`output_dir`") as got:
        install_checkpoint_mask(model, folder)
    assert "elete" not in str(got.value)


def test_other_whole_modules_than_the_checkpoints_are_refused(checkpoint, tmp_path):
    _, folder = checkpoint
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, modules_to_save=["lm_head"]))
    with pytest.raises(SpftError, match=r"holds `modules_to_save: \[\]`, but the run has \['lm_head'\]: restore"):
        install_checkpoint_mask(model, folder)
    select_mask(with_head := get_peft_model(tiny_llama(), SpftConfig(modules_to_save=["lm_head"], **MADE_WITH)), None)
    with_head.save_pretrained(tmp_path / "with_head")
    with pytest.raises(SpftError, match=r"holds `modules_to_save: \['lm_head'\]`, but the run has \[\]"):
        install_checkpoint_mask(get_peft_model(tiny_llama(), SpftConfig(density=0.05)), str(tmp_path / "with_head"))
    install_checkpoint_mask(model, str(tmp_path / "with_head"))


def test_a_checkpoint_of_another_kind_is_refused(lora):
    model = get_peft_model(tiny_llama(), SpftConfig())
    with pytest.raises(SpftError, match=r"lora holds an adapter of the kind LORA.*another `output_dir`"):
        install_checkpoint_mask(model, lora)


def test_adapters_of_another_kind_are_no_start(checkpoint, lora):
    check_lora_model_dir(DictDefault())
    check_lora_model_dir(DictDefault(lora_model_dir=checkpoint[1]))
    with pytest.raises(SpftError, match=r"lora holds an adapter of the kind LORA.*in `lora_model_dir`"):
        check_lora_model_dir(DictDefault(lora_model_dir=lora))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modules_to_save": ["lm_head", "norm"]}, r"`spft.modules_to_save: \['lm_head', 'norm'\]` is not trained by"),
        ({"bias": "all"}, r"`spft.bias: all` is not trained by the adapter in `lora_model_dir`, which has none"),
    ],
)
def test_what_the_adapter_to_go_on_from_does_not_train_is_refused(checkpoint, options, message):
    with pytest.raises(SpftError, match=message + r".*merge that adapter first"):
        check_lora_model_dir(DictDefault(lora_model_dir=checkpoint[1], spft=options))
    check_lora_model_dir(DictDefault(lora_model_dir=checkpoint[1], spft={"modules_to_save": [], "bias": "none"}))


def test_options_that_an_adapter_to_go_on_from_decides_are_named():
    saved = SpftConfig(target_modules={"q_proj", "v_proj"}, exclude_modules=["x"], **MADE_WITH)
    same = {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["x"], "scope": "global", "mask_path": None}
    assert options_not_read(same | {"target_modules": "all-linear"}, saved) == options_not_read(same, saved) == []
    other = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "exclude_modules": ["y"],
             "layers_to_transform": [0], "mask_path": "m.safetensors", "lift_rank": 7, "scope": "row"}  # fmt: skip
    said = options_not_read(other, saved)
    assert len(said) == len(other) and all(any(f"`spft.{name}: " in each for each in said) for name in other)
    assert any("['q_proj']` is not read" in each and "has ['q_proj', 'v_proj']" in each for each in said)


@pytest.mark.parametrize("rl", [RLType.DPO, RLType.IPO, RLType.KTO])
def test_trainers_that_make_the_adapter_themselves_read_none(checkpoint, rl):
    folder = checkpoint[1]
    with pytest.raises(SpftError, match=f"is not read under `rl: {rl.value}`.*axolotl merge-lora.*`base_model`"):
        check_lora_model_dir(DictDefault(lora_model_dir=folder, rl=rl))
    check_lora_model_dir(DictDefault(lora_model_dir=folder, rl=rl, merge_lora=True))
    check_lora_model_dir(DictDefault(lora_model_dir=folder, rl=RLType.ORPO))


def test_the_adapter_to_compare_with_is_the_trained_one(checkpoint, tmp_path):
    """As TRL's trainers make it for an adapter that was loaded; their own copying finds no parameter of ours."""
    made, _ = checkpoint
    with torch.no_grad():
        for layer in adapted_layers(made).values():
            layer.spft_values["default"].normal_()
    made.save_pretrained(tmp_path / "trained")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained", is_trainable=True)
    base, trained = logits(tiny_llama()), logits(model)
    assert not has_reference(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert has_reference(model)
    copy_to_reference(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, base)
    model.set_adapter("default")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.spft_values["default"].zero_()
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both" / "ref", adapter_name="ref")
    assert torch.equal(logits(again), trained)
