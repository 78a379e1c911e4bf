"""Which modules can have a sparse delta: those that are refused would compute something else than their weight says."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.plugin.module_names import check_module_names
from tests.checkpoint.saved import tiny_mixtral
from tests.models import tiny_llama, tiny_moe, token_batch


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def adapted(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(module)
    return get_peft_model(model, SpftConfig(target_modules=["0"], density=0.2, init_weights=False))


@pytest.mark.parametrize("kind", [Renamed, FalconLinear])
def test_subclasses_that_multiply_by_their_weight(kind):
    model, x = adapted(kind(13, 7)), torch.randn(5, 13)
    before = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scaled(13, 7), "`0` is a Scaled, which is not supported"),
        (lambda: parametrizations.weight_norm(nn.Linear(13, 7)), "parametrized one: remove the parametrization"),
        (lambda: nn.Linear(13, 7).to(torch.float8_e4m3fn), "its is of torch.float8_e4m3fn"),
    ],
    ids=["own forward", "parametrized", "float8"],
)
def test_other_linear_layers_are_refused_by_name(make, said):
    with pytest.raises(TypeError, match=said):
        adapted(make())


def test_a_layer_of_another_adapter_is_refused_by_name():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(TypeError, match=r"q_proj` is adapted by a peft\.tuners\.lora\.layer\.Linear already: merge"):
        get_peft_model(model, SpftConfig(target_modules=["q_proj"]))


def test_experts_in_one_parameter_are_named_with_what_to_do():
    said = (
        r"`target_modules: gate_up_proj` matches no module of the Qwen2MoeForCausalLM: "
        r"model\.layers\.0\.mlp\.experts\.gate_up_proj is one parameter of three dimensions, \(3, 36, 28\), .*name "
        r"it in `target_parameters: \[experts\.gate_up_proj\]` instead"
    )
    for targets in (["gate_up_proj"], ["q_proj", "experts.gate_up_proj"]):
        with pytest.raises(SpftError, match=said.replace("gate_up_proj`", f"{targets[-1]}`")):
            get_peft_model(tiny_moe(), SpftConfig(target_modules=targets))
    with pytest.raises(SpftConfigError, match=said):
        check_module_names({"target_modules": ["q_proj", "gate_up_proj"]}, tiny_moe())
    with pytest.raises(SpftError, match=said.replace(r"gate_up_proj` m", r"\.\*experts\.gate_\.\*` m")):
        get_peft_model(tiny_moe(), SpftConfig(target_modules=r".*experts.gate_.*"))
    with pytest.raises(SpftError, match=r"`target_modules: experts.down_proj` .* of the MixtralForCausalLM"):
        get_peft_model(tiny_mixtral(), SpftConfig(target_modules=["experts.down_proj"]))
    get_peft_model(tiny_moe(), SpftConfig(target_modules=r".*(gate_up|q)_proj"))
    # the shared expert's is a module
    get_peft_model(tiny_moe(), SpftConfig(target_modules=["down_proj"]))


@pytest.mark.parametrize("how", ["inject", "add_adapter", "none"])
def test_a_model_that_is_no_peft_model_is_told_how_to_become_one(how):
    model, config = tiny_llama(), SpftConfig(target_modules=["q_proj"])
    if how == "inject":
        model = inject_adapter_in_model(config, model)
    elif how == "add_adapter":
        try:
            model.add_adapter(config)
        except ValueError as error:
            # transformers 5.24 asks for a PEFT that is not out yet, whatever the method
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    with pytest.raises(
        SpftError, match=r"needs a PeftModel, but was given a LlamaForCausalLM.*peft.get_peft_model\("
    ) as got:
        select_mask(model, [token_batch()])
    assert ("inject_adapter_in_model() has put" in str(got.value)) == (how != "none")
    with pytest.raises(SpftError, match="needs a PeftModel"):
        select_mask(nn.Linear(3, 2), None)


def test_an_adapter_that_is_none_of_ours_or_not_there_is_named():
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SpftError, match=r"`default` is no sparse adapter of this model, which has `default` \(LORA\)"):
        select_mask(lora, [token_batch()])
    with pytest.raises(SpftError, match=r"`other` is no sparse adapter of this model, which has `default` \(SPFT\)"):
        select_mask(get_peft_model(tiny_llama(), SpftConfig()), [token_batch()], adapter_name="other")
