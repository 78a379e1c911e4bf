"""What `axolotl merge-lora` makes of a run on a quantized base: the files that `axolotl spft merge` writes."""

from __future__ import annotations

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault

from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.plugin.streamed_merge import merge_arguments, merge_instead
from tests.checkpoint.saved import contents, save_adapter, save_base
from tests.models import tiny_llama


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", None])
def test_the_base_is_the_one_of_the_training_although_axolotl_puts_its_quantization_off(tmp_path, key):
    base = save_base(tmp_path / "base", tiny_llama)
    save_adapter(tmp_path / "run", base)
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
