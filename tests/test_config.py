"""`SpftConfig` and the rules of its options."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from peft import PeftConfig
from safetensors.torch import save_file

from axolotl_spft import SpftConfig
from axolotl_spft.config import option_names
from axolotl_spft.config_rules import check_options
from axolotl_spft.errors import SpftConfigError, SpftError, SpftFileError


def test_defaults():
    config = SpftConfig()
    assert config.density == 0.005
    assert config.target_modules == "all-linear"
    assert (config.salience, config.scope, config.samples) == ("gradient", "layer", 128)
    assert config.init_weights is True


@pytest.mark.parametrize("budget", [{"num_values": 10}, {"match_lora_rank": 2}])
def test_another_budget_replaces_the_default_density(budget):
    assert SpftConfig(**budget).density is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"density": 0}, ["`density: 0` must be a number in (0, 1]"]),
        ({"density": float("nan")}, ["`density: nan`"]),
        ({"density": "half"}, ["`density: half`"]),
        ({"num_values": 1.5}, ["`num_values: 1.5` must be a whole number"]),
        ({"match_lora_rank": 0}, ["`match_lora_rank: 0`"]),
        ({"samples": True}, ["`samples: True` must be a whole number"]),
        ({"salience": "fischer"}, ["or your own package.module:function (did you mean `fisher`?)"]),
        ({"salience": "my module:score"}, ["`salience: my module:score` must be one of gradient, balanced, snip, "]),
        ({"lift_rank": 0}, ["`lift_rank: 0` must be a whole number of at least 1"]),
        ({"salience": ["gradient"]}, ["`salience: ['gradient']`"]),
        ({"scope": "model"}, ["`scope: model` must be one of layer, global, row"]),
        ({"seed": -1}, ["`seed: -1`"]),
        ({"target_modules": []}, ["`target_modules: []`"]),
        ({"modules_to_save": "lm_head"}, ["`modules_to_save: lm_head` must be a list"]),
        ({"mask_path": ""}, ["`mask_path: `"]),
        ({"init_weights": "no"}, ["`init_weights: no` must be true or false"]),
        ({"density": 0.1, "num_values": 3}, ["`density: 0.1` and `num_values: 3`", "keep exactly one"]),
        ({"density_pattern": {"q_proj": 0}}, ["`density_pattern: {'q_proj': 0}` must be a block of"]),
        ({"density_pattern": [0.1]}, ["`density_pattern: [0.1]`"]),
        ({"density_pattern": {"(": 0.1}}, ["`density_pattern` has `(`, which is not a regular expression"]),
        ({"min_density": 0.001}, ["`min_density: 0.001` bounds"]),
        ({"max_density": 0.5, "scope": "row"}, ["`scope: row` fixes the share of each: write `scope: global`"]),
        ({"min_density": 0.6, "max_density": 0.5, "scope": "global"}, ["`min_density: 0.6` is above"]),
        ({"min_density": 0.01, "scope": "global"}, ["`min_density: 0.01` cannot be kept with `density: 0.005`"]),
        ({"max_density": 0.1, "density": 0.2, "scope": "global"}, ["`max_density: 0.1` cannot be kept"]),
        ({"pattern": "blocks"}, ["`pattern: blocks` must be one of element, block"]),
        ({"block_size": 64}, ["`block_size: 64` must be [rows, columns]"]),
        ({"block_size": [64, 0]}, ["`block_size: [64, 0]` must be"]),
        ({"pattern": "block", "scope": "row"}, ["`pattern: block` chooses blocks of several rows"]),
        ({"pattern": "block", "init_weights": False}, ["`init_weights: False` draws single entries"]),
        ({"score_after": -1}, ["`score_after: -1` must be a whole number of at least 0"]),
        ({"salience_memory_gib": 0}, ["`salience_memory_gib: 0` must be a number above 0"]),
        ({"density": 2, "samples": 0, "scope": None}, ["`density: 2`", "`samples: 0`", "`scope: None`"]),
    ],
)
def test_broken_rules_are_reported_together(options, parts):
    with pytest.raises(SpftConfigError) as caught:
        SpftConfig(**options)
    assert isinstance(caught.value, (SpftError, ValueError))
    assert len(caught.value.problems) == (1 if "keep exactly one" in parts else len(parts))
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"density": "5e-3"}, "(YAML reads this as text: write 0.005)"),
        ({"density": "1"}, "(YAML reads this as text: write 1.0)"),
        ({"num_values": "1e6"}, "(YAML reads this as text: write 1000000)"),
        ({"num_values": 1e6}, "(write 1000000)"),
        ({"samples": "128"}, "(YAML reads this as text: write 128)"),
        ({"layers_to_transform": "3"}, "(YAML reads this as text: write 3)"),
        ({"samples": "12.5"}, None),
        ({"density": "inf"}, None),
        ({"density": float("nan")}, None),
        ({"samples": True}, None),
        ({"density": "3"}, None),
    ],
    ids=str,
)
def test_a_number_in_another_form_is_written_out_where_that_would_do(options, remedy):
    (problem,) = check_options(options)
    assert problem.endswith(remedy) if remedy else "write" not in problem
    if remedy:
        ((name, _),) = options.items()
        assert check_options(yaml.safe_load(f"{name}: {remedy.split()[-1].rstrip(')').removeprefix('(')}")) == []


def test_unknown_keys_get_a_suggestion_and_the_list():
    (problem,) = check_options({"densty": 0.1})
    assert "unknown key `densty` (did you mean `density`?): the keys" in problem
    assert all(name in problem for name in option_names())
    (problem,) = check_options({"zzz": 1})
    assert "did you mean" not in problem


def test_every_option_has_a_description_and_a_rule():
    described = {field.name: field.metadata.get("help") for field in dataclasses.fields(SpftConfig)}
    assert all(described[name] for name in option_names())
    # an option without a rule would be reported as unknown
    assert check_options({name: getattr(SpftConfig(), name) for name in option_names()}) == []


def test_saved_and_read_again(tmp_path):
    config = SpftConfig(num_values=12, target_modules=["q_proj", "v_proj"], salience="balanced", scope="row", seed=3)
    config.nnz, config.base_shapes, config.mask_source = 12, "00", {"salience": "balanced"}
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, SpftConfig)
    assert again.to_dict() == config.to_dict()


def test_a_truncated_weights_file_is_refused_before_anything_else(tmp_path):
    import torch

    SpftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    SpftConfig.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SpftFileError, match="not a complete safetensors file"):
        SpftConfig.from_pretrained(tmp_path)
