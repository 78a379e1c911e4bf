"""Asking Axolotl for a quantized base, and checking that it came."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault

from axolotl_spft.errors import SpftError
from axolotl_spft.plugin.quantization import (
    check_quantized,
    make_exceptions,
    prepare_for_training,
    request_quantization,
    run_dtype,
)
from tests.models import tiny_llama
from tests.tuner.test_quantized import quantize


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [({"bf16": True}, "bfloat16"), ({"fp16": True, "bf16": False}, "float16"), ({"bf16": False}, "float32")],
)
def test_four_bit_as_on_axolotls_qlora_path(keys, dtype):
    cfg = {"load_in_4bit": True, **keys}
    request_quantization(cfg)
    settings = cfg["model_kwargs"]["quantization_config"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"] is True
    assert settings["bnb_4bit_compute_dtype"] == settings["bnb_4bit_quant_storage"] == dtype
    assert settings["load_in_4bit"] is True


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("fp16", [None, False, True])
@pytest.mark.parametrize("bf16", ["auto", True, False])
@pytest.mark.parametrize("bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}])
def test_the_runs_dtype_is_the_one_that_axolotl_resolves(monkeypatch, bits, bf16, fp16, has_bf16):
    import axolotl.utils.config
    from axolotl.utils.dict import DictDefault

    for module in ("axolotl.utils.config", "transformers.utils"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: has_bf16)
    keys = bits | ({"bf16": bf16} if fp16 is None else {"bf16": bf16, "fp16": fp16})
    resolved = DictDefault(keys)
    axolotl.utils.config.resolve_dtype(resolved)
    expected = str(resolved.torch_dtype).removeprefix("torch.")
    assert run_dtype(keys) == expected == run_dtype(keys, computes_bf16=has_bf16)


def test_eight_bit_and_neither():
    cfg = {"load_in_8bit": True, "model_kwargs": {"a": 1}}
    request_quantization(cfg)
    assert cfg["model_kwargs"] == {
        "a": 1,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }
    cfg = {}
    request_quantization(cfg)
    assert cfg == {}


@pytest.mark.parametrize("load", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("kind", ["llama", "falcon_h1", "jamba", "qwen2_moe", "nemotron_h"])
@pytest.mark.parametrize("deepspeed", [None, "zero2.json"])
def test_kinds_of_model_that_axolotl_makes_exceptions_for(kind, load, deepspeed):
    """The settings that Axolotl's own loader makes for LoRA and QLoRA."""
    from axolotl.loaders.model import ModelLoader
    from transformers import BitsAndBytesConfig

    keys = {load: True, "bf16": True, "model_config_type": kind, "deepspeed": deepspeed}
    raw = dict(keys)
    request_quantization(raw)
    cfg = DictDefault({**keys, "overrides_of_model_kwargs": raw["model_kwargs"]})
    make_exceptions(cfg)
    ours = BitsAndBytesConfig(
        **{
            key: value
            for key, value in cfg.overrides_of_model_kwargs["quantization_config"].items()
            if key != "quant_method"
        }
    )

    adapter = "qlora" if load == "load_in_4bit" else "lora"
    loader = SimpleNamespace(
        cfg=DictDefault({**keys, "adapter": adapter, "torch_dtype": torch.bfloat16}),
        model_config=SimpleNamespace(),
        model_kwargs={},
        is_fsdp_enabled=False,
    )
    ModelLoader._set_quantization_config(loader)
    assert ours.to_dict() == loader.model_kwargs["quantization_config"].to_dict()


def test_the_users_own_settings_win():
    cfg = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}
    request_quantization(cfg)
    assert cfg["model_kwargs"]["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    own = {"quantization_config": {"quant_method": "gptq"}}
    cfg = {"load_in_4bit": True, "model_kwargs": dict(own)}
    request_quantization(cfg)
    assert cfg["model_kwargs"] == own


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_model_that_is_not_quantized_is_refused(kind):
    wanted = {"load_in_4bit": kind == "4bit", "load_in_8bit": kind == "8bit"}
    with pytest.raises(SpftError, match=f"`load_in_{kind}: true`, but the loaded model has no bitsandbytes"):
        check_quantized(tiny_llama(), **wanted)
    check_quantized(quantize(tiny_llama(), kind), **wanted)
    check_quantized(tiny_llama(), False, False)


def test_preparation_keeps_norms_and_embeddings_in_the_runs_dtype():
    model = quantize(tiny_llama(torch.bfloat16), "4bit", torch.bfloat16)
    model.is_loaded_in_4bit = True
    model = prepare_for_training(model, torch.bfloat16, {"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
