"""Weights as a quantized base holds them: quantized by bitsandbytes and read back as training reads them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.weight.dequantize import dequantize_4bit


class Quantizer:
    """What loading with a quantization does to the weights of a model.

    Args:
        settings: of transformers' ``BitsAndBytesConfig``.
        model: the model on the meta device.
        dtype: that the model was loaded in, which the weights have before they are quantized; that of the checkpoint
            by default.

    Attributes:
        modules: the modules whose weight is quantized.

    Raises:
        SpftFileError: the settings are refused.
    """

    def __init__(self, settings: Mapping[str, Any], model: nn.Module, dtype: torch.dtype | None = None):
        from transformers import BitsAndBytesConfig
        from transformers.quantizers import AutoHfQuantizer

        try:
            config = BitsAndBytesConfig(**settings)
        except (TypeError, ValueError) as error:
            raise SpftFileError(f"these settings of the quantization are refused: {error}") from error
        self.dtype, self.four_bit, self._config = dtype, config.load_in_4bit, config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        import bitsandbytes as bnb

        kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        changed = copy.deepcopy(model)
        AutoHfQuantizer.from_config(config).preprocess_model(model=changed, device_map={"": "cpu"})
        self.modules = {name for name, module in changed.named_modules() if isinstance(module, kinds)}

    def round_trip(self, weight: Tensor) -> Tensor:
        """Q(W) of a W (out_features, in_features), dequantized: new memory, in the dtype that training reads."""
        import bitsandbytes as bnb
        from peft.utils.quantization_utils import resolve_quantization_backend

        given = weight.to(self.dtype or weight.dtype)
        if self.four_bit:
            layer = bnb.nn.Linear4bit(1, 1, bias=False, device="meta")
            layer.weight = bnb.nn.Params4bit(
                given.contiguous(),
                requires_grad=False,
                compress_statistics=self._config.bnb_4bit_use_double_quant,
                quant_type=self._config.bnb_4bit_quant_type,
                quant_storage=self._config.bnb_4bit_quant_storage,
                module=layer,
            ).to(self._device)
        else:
            layer = bnb.nn.Linear8bitLt(1, 1, bias=False, has_fp16_weights=False, device="meta")
            layer.weight = bnb.nn.Int8Params(given.contiguous(), requires_grad=False, has_fp16_weights=False).to(
                self._device
            )
        back = dequantize_4bit(layer.weight) if self.four_bit else None
        if back is None:
            back = resolve_quantization_backend(layer).get_base_weight(layer)
        return back.to("cpu").view(weight.shape)
