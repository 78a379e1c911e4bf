"""Names of adapters that would cost the files of others their layers."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from safetensors.torch import load_file

from axolotl_spft import SpftConfig
from axolotl_spft.errors import SpftError
from tests.models import logits, tiny_llama, with_adapter

CONFIG = {"density": 0.1, "init_weights": False, "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("name", ["1", "mlp", "weight"])
def test_a_part_of_the_model_is_no_name_beside_others(name):
    model = with_adapter(tiny_llama(), adapter_name="math", modules_to_save=["lm_head"])
    before = logits(model)
    with pytest.raises(SpftError, match=rf"adapter `{name}` is called as a part of the model.*`adapter_name='{name}_"):
        model.add_adapter(name, SpftConfig(**CONFIG))
    assert list(model.peft_config) == ["math"] and (logits(model) == before).all()
    model.add_adapter("other", SpftConfig(**CONFIG))
    alone = with_adapter(tiny_llama(), adapter_name=name)
    with pytest.raises(SpftError, match=f"adapter `{name}` is called as a part of the model"):
        alone.add_adapter("math", SpftConfig(**CONFIG))


def test_other_names_and_single_adapters_are_whole(tmp_path):
    with_adapter(tiny_llama(), adapter_name="1").save_pretrained(tmp_path / "one")
    assert any(".layers.1." in key for key in load_file(tmp_path / "one" / "1" / "adapter_model.safetensors"))
    model = get_peft_model(tiny_llama(), SpftConfig(**CONFIG), adapter_name="math")
    # of the others those that have whole modules have their names in the model, and one may be added again
    for name in ("default", "11", "layer", "default"):
        model.add_adapter(name, SpftConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    keys = [set(load_file(tmp_path / part / "adapter_model.safetensors")) for part in ("math", "", "11", "layer")]
    assert all(each == keys[0] for each in keys)
    assert any(".layers.1." in key for key in keys[0])
