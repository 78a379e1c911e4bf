"""Keys of Axolotl with two names: whichever a file has is read."""

from __future__ import annotations

import json

import pytest
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import RemappedParameters

from axolotl_spft.plugin.args import check_run
from axolotl_spft.plugin.key_names import of_two_names
from axolotl_spft.plugin.salience_rules import kind_of_base
from axolotl_spft.plugin.streamed_merge import merge_arguments
from tests.hub import fill_cache

RUN = {"adapter": "spft", "optimizer": "sparse_adamw", "base_model": "of/us", "output_dir": "out"}


class Keys(RemappedParameters):
    """The part of Axolotl's configuration with these keys, read as the whole is."""

    model_config = AxolotlInputConfig.model_config


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [("revision_of_model", "v1", "v2"), ("overrides_of_model_config", {"a": 1}, {"a": 2}),
     ("overrides_of_model_kwargs", {"b": 1}, {"b": 2})],
)  # fmt: skip
def test_a_key_is_read_as_axolotl_reads_it(key, first, second):
    other = Keys.model_fields[key].alias
    for cfg in ({key: first}, {other: second}, {key: first, other: second}, {key: first, other: None}, {}):
        # a name without a value stands in no file that Axolotl takes, and means nothing
        by_axolotl = Keys.model_validate({name: value for name, value in cfg.items() if value})
        assert of_two_names(cfg, key) == getattr(by_axolotl, key), cfg


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
def test_a_merge_and_the_rules_read_the_commit_that_was_trained(tmp_path, monkeypatch, key):
    for name, more in (("plain", {}), ("quantized", {"quantization_config": {"quant_method": "gptq"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", **more}))
    branches = {"main": tmp_path / "plain", "v2": tmp_path / "quantized"}
    fill_cache(tmp_path / "hub", "of/us", branches, monkeypatch)
    assert merge_arguments({**RUN, key: "v2"}, "config.yml")["revision"] == "v2"
    assert kind_of_base({**RUN, key: "v2"}) == "gptq" and kind_of_base(RUN) is None


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision", "overrides_of_model_config", "model_config"])
def test_a_value_of_a_wrong_kind_is_told_under_the_name_that_the_file_has(key):
    assert any(f"`{key}: 3` must be" in problem for problem in check_run({**RUN, key: 3}))
