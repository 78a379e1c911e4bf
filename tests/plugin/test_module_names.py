"""Names in the lists of the ``spft:`` block that are no module's."""

from __future__ import annotations

import pytest

from axolotl_spft.errors import SpftConfigError
from axolotl_spft.plugin.module_names import check_module_names
from tests.models import tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "modules_to_save": None},
        {"target_modules": "nothing.*"},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj", "mlp.down_proj"], "exclude_modules": ["q_proj"]},
        # PEFT matches the end of a name here, not of a part of it
        {"modules_to_save": ["head", "embed_tokens"]},
    ],
)
def test_names_of_modules_pass(options):
    check_module_names(options, tiny_llama())


def test_names_that_axolotl_asks_for_may_match_nothing():
    options = {"modules_to_save": ["wte", "lm_head", "embed_tokens"]}
    check_module_names(options, tiny_gpt2(), ["embed_tokens", "lm_head"])
    with pytest.raises(SpftConfigError, match="`modules_to_save: embed_tokens` matches no module"):
        check_module_names(options, tiny_gpt2())
    with pytest.raises(SpftConfigError, match="`target_modules: embed_tokens` matches no module"):
        check_module_names({"target_modules": ["c_attn", "embed_tokens"]}, tiny_gpt2(), ["embed_tokens"])


def test_names_that_match_nothing_are_refused_together():
    options = {"target_modules": ["q_proj", "v_prj", "proj"], "modules_to_save": ["lm_hed", "lm_head"]}
    with pytest.raises(SpftConfigError) as caught:
        check_module_names(options, tiny_llama())
    assert caught.value.problems == tuple(
        f"`{key}` matches no module of the LlamaForCausalLM: correct the name, or leave it out"
        for key in ("target_modules: v_prj", "target_modules: proj", "modules_to_save: lm_hed")
    )
