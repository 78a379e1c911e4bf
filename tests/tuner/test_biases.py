"""Biases that are trained whole and saved with the adapter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_spft import SpftConfig
from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.shira import write_shira
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.trainer.saved_adapter import check_reference
from tests.checkpoint.saved import merged_in_memory
from tests.models import logits, tiny_gpt2, tiny_llama, tiny_qwen2, token_batch, with_adapter


def biases_of(model) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.base_model.model.named_parameters() if "bias" in name}


def trained(make):
    """An adapter whose biases have moved."""
    model = with_adapter(make(), bias="all", density=0.05)
    torch.manual_seed(3)
    with torch.no_grad():
        for bias in biases_of(model).values():
            bias.add_(torch.randn_like(bias))
    return model


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_gpt2])
def test_all_biases_are_trained_and_saved(make, tmp_path):
    model = trained(make)
    assert all(bias.requires_grad for bias in biases_of(model).values())
    # under two names, but once
    names = [name for name, _ in model.named_parameters()]
    assert sum("bias" in name for name in names) == len(biases_of(model))
    optimized = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert (
        len(set(map(id, optimized)))
        == len(optimized)
        == len(biases_of(model)) + sum(".spft_values." in n for n in names)
    )
    expected = logits(model)
    with (
        pytest.warns(UserWarning, match="bias configured to be 'all' does not produce the same output"),
        model.disable_adapter(),
    ):
        pass
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(make(), tmp_path, **options)
        assert torch.equal(logits(loaded), expected)
        assert all(bias.requires_grad == ("is_trainable" in options) for bias in biases_of(loaded).values())
        # and again over itself, as a trainer does that resumes
        loaded.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(logits(loaded), expected)
        held = loaded.base_model.spft_bias["default"]._parameters
        for name, bias in biases_of(loaded).items():
            assert held[name.replace(".base_layer.", ".").replace(".", "/")] is bias
    loaded.delete_adapter("default")
    assert not loaded.base_model.spft_bias


def test_a_file_whose_biases_do_not_fit_is_refused(tmp_path):
    trained(tiny_qwen2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.spft_bias.model/layers/0/self_attn/q_proj/bias"
    for change, message in (
        ({key: None}, r"model\.layers\.0\.self_attn\.q_proj\.bias is missing"),
        ({key: tensors[key][1:]}, r"q_proj\.bias is \(27,\), but \(28,\) in the model"),
        ({key: tensors[key] / 0}, r"q_proj\.bias holds a NaN or an infinity"),
        ({key + "s": tensors[key].clone()}, r"q_proj\.biass is in the file, but not in the model"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, path)
        base = tiny_qwen2()
        before = logits(base)
        with pytest.raises(SpftFileError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(base), before)


def test_one_adapter_of_a_model_has_biases():
    model = trained(tiny_qwen2)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", SpftConfig(bias="all"))
    model = trained(tiny_qwen2)
    with pytest.raises(SpftError, match="`bias: all`"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.warns(UserWarning, match="the LlamaForCausalLM has no biases"):
        get_peft_model(tiny_llama(), SpftConfig(bias="all"))


def test_rows_of_another_adapter_would_have_the_biases_too():
    model = trained(tiny_qwen2).eval()
    model.add_adapter("other", SpftConfig(init_weights=False))
    batch = {"input_ids": token_batch()["input_ids"]}
    for names in (["default", "other"], ["default", "__base__"]):
        with pytest.raises(SpftError, match=r"`default` trained .*`bias: all`"):
            model(**batch, adapter_names=names)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, adapter_names=["default"] * 2).logits, logits(model))


def test_a_trainer_that_compares_with_the_base_is_refused():
    reference = SimpleNamespace(ref_model=None, beta=0.1, args=SimpleNamespace())
    model = get_peft_model(tiny_qwen2(), SpftConfig(bias="all"))
    with pytest.raises(SpftError, match="`bias: all` trains the base model's own biases"):
        check_reference(reference, model)
    check_reference(reference, get_peft_model(tiny_qwen2(), SpftConfig()))
    check_reference(SimpleNamespace(args=reference.args), model)
    reference.args.precompute_ref_log_probs = True
    check_reference(reference, model)


def test_files_with_biases_are_merged_combined_and_not_converted(tmp_path):
    base = tmp_path / "base"
    tiny_qwen2().save_pretrained(base)
    trained(tiny_qwen2).save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.biases) == 6 and not adapter.others
    one, _ = combine([adapter])
    write_adapter(tmp_path / "written", one)
    expected = merged_in_memory(base, tmp_path / "adapter")
    assert (
        expected["model.layers.0.self_attn.q_proj.bias"]
        - tiny_qwen2().state_dict()["model.layers.0.self_attn.q_proj.bias"]
    ).any()
    for folder in ("adapter", "written"):
        merge(tmp_path / folder, tmp_path / f"{folder}_merged", base)
        got = load_file(tmp_path / f"{folder}_merged" / "model.safetensors")
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert torch.equal(merged_in_memory(base, tmp_path / "written")["model.layers.0.self_attn.q_proj.bias"],
                       expected["model.layers.0.self_attn.q_proj.bias"])  # fmt: skip
    assert combine([adapter, adapter])[0].biases.keys() == adapter.biases.keys()
    other = replace(adapter, biases={name: bias + 1 for name, bias in adapter.biases.items()})
    with pytest.raises(SpftFileError, match="`bias: all`"):
        combine([adapter, other])
    with pytest.raises(SpftFileError, match="`bias: all`"):
        write_shira(tmp_path / "shira", adapter)
