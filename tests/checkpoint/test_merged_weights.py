"""The tensors of a merged checkpoint, and the figures of how exact they are."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.exactness import Exactness, total
from axolotl_spft.checkpoint.merged_weights import MergedWeights
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import mask_from_positions
from tests.checkpoint.saved import save_base, tied_llama
from tests.models import tiny_llama

MODULE = "model.layers.1.mlp.up_proj"
KEY = f"{MODULE}.weight"


def delta_of(shape, values, first: int = 0) -> SavedDelta:
    values = torch.tensor(values)
    return SavedDelta(values, mask_from_positions(torch.arange(first, first + len(values)), *shape), shape)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base", tiny_llama)


def merged_of(base, make=tiny_llama, others=None, **deltas) -> MergedWeights:
    named = {name.replace("__", "."): delta for name, delta in deltas.items()}
    return MergedWeights(BaseCheckpoint(base, make()), SavedAdapter({}, named, others or {}))


def test_only_what_the_adapter_changes_is_made(base):
    weight = BaseCheckpoint(base, tiny_llama()).read_parameter(KEY)
    merged = merged_of(base, **{MODULE: delta_of(tuple(weight.shape), [1.0, 1e-9, 0.0])})
    assert merged.changed(KEY) == (torch.bfloat16, tuple(weight.shape))
    assert merged.changed("model.layers.0.mlp.up_proj.weight") is None and merged.additional == {}
    made = merged.make(KEY)
    expected = weight.clone()
    expected.view(-1)[0] = weight.view(-1)[0].float() + 1.0
    assert made.dtype == torch.bfloat16 and torch.equal(made, expected)
    figures = merged.exactness[KEY]
    # a value of 0 has no effect, but none that rounding took away
    assert (figures.values, figures.without_effect) == (3, 1)
    error = (made.double().view(-1)[0] - weight.double().view(-1)[0] - 1.0).item() ** 2 + 1e-18
    assert figures.rounding == pytest.approx(error) and figures.delta == pytest.approx(1.0)
    assert figures.trained == figures.from_trained == 0.0


def test_figures_add_up():
    one, other = Exactness(2, 1, 4.0, 1.0, 9.0, 0.0), Exactness(3, 0, 12.0, 0.0, 0.0, 0.09)
    summary = total({"b": one, "a": other}).summary()
    assert summary == {"values": 5, "without_effect": 1, "rounding_error": 0.25, "difference_from_trained": 0.1}
    assert set(total({}).summary().values()) == {0}


def test_an_adapted_tied_head_becomes_a_tensor_of_its_own(tmp_path):
    base = save_base(tmp_path / "base", tied_llama)
    embeddings = BaseCheckpoint(base, tied_llama()).read_parameter("model.embed_tokens.weight")
    merged = merged_of(base, tied_llama, lm_head=delta_of(tuple(embeddings.shape), [2.0]))
    assert list(merged.additional) == ["lm_head.weight"] and merged.changed("model.embed_tokens.weight") is None
    assert merged.make("lm_head.weight").view(-1)[0] == (embeddings.view(-1)[0].float() + 2.0).bfloat16()
    assert torch.equal(merged.make("lm_head.weight").view(-1)[1:], embeddings.view(-1)[1:])


def test_a_matrix_of_another_shape_is_named(base):
    merged = merged_of(base, **{MODULE: delta_of((4, 5), [1.0])})
    with pytest.raises(SpftFileError, match=rf"{MODULE} is \(\d+, \d+\) in .* but \(4, 5\) in the adapter"):
        merged.make(KEY)
    with pytest.raises(SpftFileError, match="holds no weight for the module"):
        merged_of(base, nowhere=delta_of((4, 5), [1.0]))
