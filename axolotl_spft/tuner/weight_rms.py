"""The size of the weights that an adapter targets: the unit in which learning rates of different models compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from axolotl_spft.engine.zero3 import gathered, is_partitioned
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import spft_layers


def weight_rms(model: nn.Module) -> float:
    """rms(W) = sqrt(sum w^2 / n) over all n entries of the matrices that a `PeftModel`'s sparse adapters target.

    The best rates of sparse values are near 0.1 rms(W) with ``salience: random`` and near 0.01 rms(W) with
    ``gradient``, whatever the model::

        optimizer = SparseAdamW(values, lr=0.1 * weight_rms(model))

    Returns:
        To 6 significant digits, which are the same on every device and engine; of a quantized base that of its
        dequantized weights. One matrix at a time is held in float32.

    Raises:
        SpftError: no weight of the model can be read, because its quantization has no inverse here.
    """
    return rms_of(spft_layers(model), squares_of_weights(spft_layers(model)))


def rms_of(layers: Mapping[str, SparseLayer], squares: Mapping[str, float]) -> float:
    """`weight_rms` of the layers, from their `squares_of_weights`."""
    if not squares:
        raise SpftError("rms(W) is not known: none of the targeted weights can be dequantized; use an absolute rate")
    entries = sum(layers[name].in_features * layers[name].out_features for name in squares)
    return float(f"{(sum(squares.values()) / entries) ** 0.5:.6g}")


@torch.no_grad()
def squares_of_weights(layers: Mapping[str, SparseLayer], show: bool = False) -> dict[str, float]:
    """name -> ||W||^2 of the weight without S, in every layer whose weight can be read; ``show`` a bar."""
    squares = {}
    for name, layer in tqdm(layers.items(), desc="rms(W)", unit="matrix", leave=False, disable=not show, delay=2):
        if not layer.forward_only:
            weight = layer.stored_weight
            with gathered([weight] if is_partitioned(weight) else []):
                squares[name] = float(layer.read_weight().to(torch.float32).square().sum())
    return squares
