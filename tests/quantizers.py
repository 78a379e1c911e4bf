"""Models that are loaded quantized from the folder of an unquantized one, by one strategy for each kind."""

from __future__ import annotations

from pathlib import Path

import peft.utils
import pytest
import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_spft.tuner import layer as sparse_linear_layer
from axolotl_spft.tuner import targets
from tests.interpreter import DEVICE

SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
KINDS = [*SETTINGS, "3bit"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ThreeBitLinear(nn.Module):
    """W in eight steps between the least and the greatest of each row, which no library has."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        self.write(linear.weight.detach())

    def write(self, weight: Tensor) -> None:
        least = weight.float().amin(1, keepdim=True)
        step = ((weight.float().amax(1, keepdim=True) - least) / 7).clamp_min(1e-12)
        self.weight = nn.Parameter(((weight.float() - least) / step).round().to(torch.uint8), requires_grad=False)
        self.register_buffer("least", least)
        self.register_buffer("step", step)

    def dequantize(self) -> Tensor:
        return (self.weight.float() * self.step + self.least).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)


class ThreeBitBackend(QuantizationBackend):
    supports_merge = True
    layer_type = "linear"
    backend_name = "3bit"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().write(weight_data)


@pytest.fixture
def three_bits(monkeypatch):
    """Let PEFT's way to a strategy find that of `ThreeBitLinear`."""
    known = peft.utils.resolve_quantization_backend

    def resolve(base_layer, **kwargs):
        return ThreeBitBackend() if isinstance(base_layer, ThreeBitLinear) else known(base_layer, **kwargs)

    for module in (sparse_linear_layer, targets):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)


def load_quantized(base: Path, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in ``base``, quantized as it is loaded; all but its head."""
    options = {} if kind == "3bit" else {"quantization_config": BitsAndBytesConfig(**SETTINGS[kind])}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options).to(DEVICE).train()
    if kind == "3bit":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
                setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], ThreeBitLinear(module))
    return model
