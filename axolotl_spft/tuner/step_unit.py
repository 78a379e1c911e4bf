"""The unit in which learning rates of sparse values compare between models and densities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from axolotl_spft.budget import total_budget
from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import shapes_of, spft_layers


def unit(rms: float, density: float) -> float:
    """rms (0.005 / density)^0.75: what `integration/evidence` has measured."""
    return rms * (0.005 / density) ** 0.75


def step_unit(model: nn.Module) -> float:
    """rms(W) (0.005 / density)^0.75, with rms(W) = sqrt(sum w^2 / n) over the n entries of all targeted matrices.

    In short runs of two small models, at densities from 0.05% to 5%, the best rates were 0.05 to 0.16 of it with
    ``salience: random``, and 0.005 to 0.03 of it, more at a higher density, with ``gradient``
    (``integration/evidence``)::

        optimizer = SparseAdamW(values, lr=0.1 * step_unit(model))

    Args:
        model: a `PeftModel`, whose active adapter's budget counts; it need not have its mask yet.

    Returns:
        To 6 significant digits, which are the same on every device and engine. Of a quantized base W is the
        dequantized weight. One matrix at a time is held in float32.

    Raises:
        SpftError: no weight of the model can be read, because its quantization has no inverse here.
    """
    layers = spft_layers(model)
    return unit_of(layers, model.peft_config[model.active_adapter], squares_of_weights(layers))


def unit_of(layers: Mapping[str, SparseLayer], config: SpftConfig, squares: Mapping[str, float]) -> float:
    """`step_unit` of the layers, from their `squares_of_weights`."""
    if not squares:
        raise SpftError(
            "rms(W) is not known, since none of the targeted weights can be dequantized: leave `relative_step` out, "
            "and set an absolute rate"
        )
    shapes = shapes_of(layers)
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    rms = (sum(squares.values()) / sum(entries[name] for name in squares)) ** 0.5
    density = total_budget(list(shapes.values()), **config.budget(list(shapes))) / sum(entries.values())
    return float(f"{unit(rms, density):.6g}")


@torch.no_grad()
def squares_of_weights(layers: Mapping[str, SparseLayer], show: bool = False) -> dict[str, float]:
    """name -> ||W||^2 of the weight without S, in every layer whose weight can be read; ``show`` a bar."""
    readable = {name: layer for name, layer in layers.items() if not layer.forward_only}
    bar = tqdm(readable.items(), desc="rms(W)", unit="matrix", leave=False, disable=not show, delay=2)
    return {name: float(layer.read_weight().to(torch.float32).square().sum()) for name, layer in bar}
