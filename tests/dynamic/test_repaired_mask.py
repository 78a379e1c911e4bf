"""A mask that changes on a repaired base: the definition, what is original and what is quantized, what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_spft import DynamicMask
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.errors import SpftFileError
from axolotl_spft.salience.install import adapted_layers
from tests.checkpoint.saved import save_base
from tests.dynamic.runs import MaskedDense, adapted, masks_of, optimizer_of, train, values_of
from tests.models import tiny_llama
from tests.quantizers import PROJECTIONS, load_quantized, three_bits  # noqa: F401
from tests.salience.test_repair import effective
from tests.tuner.test_quantized import dequantized

pytestmark = pytest.mark.usefixtures("three_bits")
STEPS, EVERY = 9, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tiny_llama)


def repaired(base, kind="nf4", **options):
    """All of its matrices but the head are quantized and repaired."""
    config = {"repair": 0.4, "target_modules": [*PROJECTIONS, "lm_head"]} | options
    return adapted(load_quantized(base, kind), **config)


def unquantized(base, model) -> dict[str, torch.Tensor]:
    """W of the matrices that are repaired, by name."""
    checkpoint = BaseCheckpoint(base, model.base_model.model)
    layers = adapted_layers(model)
    return {name: checkpoint.read_matrix(name).float() for name in layers if layers[name].repairs}


@pytest.mark.parametrize(
    ("kind", "scope", "drop", "fraction"), [("nf4", "layer", "value", 0.25), ("int8", "row", "value_gradient", 0.5)]
)
def test_equals_dense_training_that_begins_at_the_unquantized_weight_where_the_mask_is(
    base, kind, scope, drop, fraction
):
    model = repaired(base, kind, scope=scope)
    first, originals = masks_of(model), unquantized(base, model)
    assert 0 < len(originals) < len(first)
    quantized = dequantized(load_quantized(base, kind))
    reference = MaskedDense(quantized, first, fraction, scope == "row", drop, originals)
    losses, dynamic = train(model, optimizer_of(model), STEPS, EVERY, fraction=fraction, drop=drop)
    assert losses == pytest.approx(reference.train(STEPS, EVERY, 1), rel=1e-5)
    masks, grown = masks_of(model), 0
    for name, layer in adapted_layers(model).items():
        assert torch.equal(masks[name], reference.masks[name]), name
        assert masks[name].sum() == first[name].sum()
        weight, start = effective(layer), reference.quantized[name].clone()
        assert torch.equal(weight[~masks[name]], start[~masks[name]])
        assert (first[name] & ~masks[name]).any()
        difference = weight - reference.start[name] - reference.deltas[name]
        assert difference.abs().max() <= 1e-5 * start.abs().max()
        if name in originals:
            values = layer.values("default")
            # the last re-selection was after the last step
            young = dynamic.history.begun[name] == STEPS
            assert young.any() and not values[young].any()
            begins = weight[masks[name]][values == 0]
            assert torch.equal(begins, originals[name][masks[name]][values == 0])
            grown += int((begins != start[masks[name]][values == 0]).sum())
            assert torch.equal(layer.originals("default").float(), originals[name][masks[name]])
    assert grown > 50


def test_a_saved_adapter_goes_on_by_the_unquantized_weights(base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "base")
    model = repaired(moved)
    train(model, optimizer_of(model), 2, 1, fraction=0.3)
    model.save_pretrained(tmp_path / "adapter")
    losses, _ = train(model, optimizer_of(model), 4, 1, fraction=0.3, first_step=3)

    def loaded():
        return PeftModel.from_pretrained(load_quantized(base, "nf4"), tmp_path / "adapter", is_trainable=True)

    again = loaded()
    others, _ = train(again, optimizer_of(again), 4, 1, fraction=0.3, first_step=3)
    assert others == losses and torch.equal(values_of(again), values_of(model))
    for one, other in zip(adapted_layers(model).values(), adapted_layers(again).values()):
        assert torch.equal(effective(one), effective(other))

    files = sorted(moved.glob("*.safetensors"))
    whole = {file: load_file(file) for file in files}

    def write(change):
        for file, tensors in whole.items():
            save_file(dict(filter(None, map(change, tensors.items()))), file, metadata={"format": "pt"})

    # of a fine-tuned base
    write(lambda item: (item[0], item[1] * 1.25))
    with pytest.raises(SpftFileError, match=r"holds other ones of .*q_proj than the adapter: name .* `repair_from`"):
        DynamicMask(loaded())
    # the first matrix alone is the same
    write(lambda item: (item[0], item[1] * (1 if "layers.0.self_attn.q_proj" in item[0] else 1.25)))
    other = loaded()
    with pytest.raises(SpftFileError, match=r"holds other ones of .*0.self_attn.k_proj than the adapter"):
        train(other, optimizer_of(other), 3, 1, fraction=0.3, first_step=3)
    shutil.rmtree(moved)
    with pytest.raises(SpftFileError, match=r"`reselect` of an adapter that repairs .*`repair_from`"):
        DynamicMask(loaded())
    elsewhere = loaded()
    elsewhere.peft_config["default"].repair_from = str(base)
    train(elsewhere, optimizer_of(elsewhere), 4, 1, fraction=0.3, first_step=3)
    assert torch.equal(values_of(elsewhere), values_of(model))
