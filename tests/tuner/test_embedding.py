"""Embeddings and heads with a sparse delta: alone, and tied, where both compute with one."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch._dynamo
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.embedding import SpftEmbedding
from tests.interpreter import DEVICE
from tests.models import (
    logits,
    same_weights,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    token_batch,
    weights_of,
    with_adapter,
)
from tests.tuner.test_gradients import assert_gradients_equal, backward, dense_twin

BOTH = ["embed_tokens", "lm_head", "q_proj"]


def tied_qwen2(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_qwen2(dtype, tie_word_embeddings=True)


def tiny_gemma3(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its embedding, which is tied, multiplies its rows."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=36, intermediate_size=50, num_key_value_heads=1, num_attention_heads=2, head_dim=18,
        num_hidden_layers=2, vocab_size=67, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").to(DEVICE)


# base, target_modules, the layers that hold S among embeddings and heads
CASES = {
    "untied": (tiny_llama, BOTH, {"model.embed_tokens", "lm_head"}),
    "tied by the embedding": (tied_qwen2, ["embed_tokens", "q_proj"], {"model.embed_tokens"}),
    "tied by the head": (tied_qwen2, ["lm_head", "q_proj"], {"model.embed_tokens"}),
    "tied by both": (tiny_gpt2, ["wte", "wpe", "lm_head", "c_attn"], {"transformer.wte", "transformer.wpe"}),
    "tied and scaled": (tiny_gemma3, ".*(lm_head|q_proj)", {"model.embed_tokens"}),
}
cases = pytest.mark.parametrize(("make", "targets", "holders"), list(CASES.values()), ids=list(CASES))


def outside(model) -> set[str]:
    """The layers that are not in a block."""
    return {name for name in adapted_layers(model) if not any(part.isdigit() for part in name.split("."))}


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_dense_weights(make, targets, holders, dtype):
    model = with_adapter(make(dtype), target_modules=targets, density=0.2)
    assert outside(model) == holders
    twin = dense_twin(model)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    expected = backward(twin)
    # the weights are written ahead from the second pass on
    for _ in range(2):
        got = backward(model)
        assert abs(got - expected) <= tolerance * expected
        assert_gradients_equal(model, twin, tolerance)
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_gradient_checkpointing(reentrant):
    model = with_adapter(tied_qwen2(), target_modules=BOTH, density=0.2)
    twin = dense_twin(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    backward(twin)
    backward(model)
    assert_gradients_equal(model, twin, 1e-4)


@pytest.mark.parametrize("make", [tiny_llama, tied_qwen2])
def test_torch_compile_has_the_same_gradients_without_a_graph_break(make):
    torch._dynamo.reset()
    model, found = with_adapter(make(), target_modules=BOTH), []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        run(input_ids=token_batch()["input_ids"]).logits.logsumexp(-1).square().sum().backward()
        found.append([layer.spft_values["default"].grad for layer in adapted_layers(model).values()])
        model.zero_grad()
    for got, expected in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@cases
def test_merging_saving_and_leaving(make, targets, holders, tmp_path):
    with warnings.catch_warnings():
        # PEFT's of tied weights, and of base weights that it saves
        warnings.filterwarnings("error", message=".*(tie_word_embeddings|save_embedding_layers)")
        base = make()
        before, plain = weights_of(base), logits(base)
        model = with_adapter(base, target_modules=targets)
        got = logits(model)
        assert (got - plain).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        model.merge_adapter(safe_merge=True)
        assert (logits(model) - got).abs().max() <= 1e-5 * got.abs().max()
        model.unmerge_adapter()
        assert torch.equal(logits(model), got)
        model.save_pretrained(tmp_path)
        merged = copy.deepcopy(model).merge_and_unload()
        assert (logits(merged) - got).abs().max() <= 1e-5 * got.abs().max()
        assert model.unload() is base and same_weights(base, before)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(loaded), got) and outside(loaded) == holders
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {
        "spft_values",
        "spft_columns",
        "spft_row_offsets",
        "spft_record",
    }
    assert not {"embed_tokens", "lm_head"} & set(
        json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert tied == (make is not tiny_llama)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


def test_a_tied_weight_that_a_third_module_uses_is_replaced_in_both():
    """There the sum is made afresh for each use, and a merge must not change what the stranger sees."""
    base = tied_qwen2()
    model = with_adapter(base, target_modules=BOTH)
    base.stranger = nn.Module()
    base.stranger.weight = base.lm_head.weight
    before = base.stranger.weight.detach().clone()
    adapted_layers(model)["model.embed_tokens"].share_weight(True)
    twin = copy.deepcopy(model)
    got = logits(model)
    backward(model)
    assert torch.equal(base.stranger.weight, before) and not adapted_layers(model)["model.embed_tokens"].in_place
    model.merge_adapter()
    assert torch.equal(base.stranger.weight, before)
    assert (logits(model) - got).abs().max() <= 1e-5 * got.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), got)
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight is base.stranger.weight
    dense = dense_twin(twin)
    backward(dense)
    assert_gradients_equal(model, dense, 1e-4)


@pytest.mark.parametrize("make", [tiny_llama, tied_qwen2])
def test_two_adapters_alone_and_together(make):
    model = with_adapter(make(), target_modules=BOTH, adapter_name="one", density=0.1)
    torch.manual_seed(5)
    model.add_adapter("two", SpftConfig(init_weights=False, density=0.15, target_modules=["lm_head"]))
    alone = {name: outputs_of(model, name) for name in ("one", "two")}
    together = outputs_of(model, ["one", "two"])
    assert (outputs_of(model, "one") - together).abs().max() > 0.01
    twin = make()
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            for adapter in layer.spft_values:
                twin.get_submodule(name).weight += layer.get_delta_weight(adapter)
    assert (together - logits(twin)).abs().max() <= 1e-5 * together.abs().max()
    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(outputs_of(model, "two"), alone["two"])
    assert torch.equal(logits(model.unload()), logits(make()))


def outputs_of(model, adapters) -> torch.Tensor:
    model.base_model.set_adapter(adapters)
    return logits(model)


@pytest.mark.parametrize("make", [tiny_llama, tied_qwen2, tiny_gemma3])
@pytest.mark.parametrize("salience_memory_gib", [None, 1e-6], ids=["together", "in groups"])
def test_the_mask_is_what_a_sort_of_the_dense_gradient_gives(make, salience_memory_gib):
    model = get_peft_model(
        make(),
        SpftConfig(density=0.05, target_modules=BOTH, samples=4, salience_memory_gib=salience_memory_gib),
    )
    select_mask(model, [token_batch(seed=1), token_batch(seed=2)])
    dense = make()
    for seed in (1, 2):
        dense(**token_batch(seed=seed)).loss.backward()
    for name, layer in adapted_layers(model).items():
        mask = layer.mask("default")
        gradient = dense.get_submodule(name).weight.grad.abs().flatten()
        chosen = positions(mask, layer.in_features)
        expected = gradient.topk(mask.nnz).values[-1]
        assert mask.nnz and gradient[chosen].min() >= (1 - 1e-5) * expected
        # of one tied weight both uses count
        assert dense.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("salience", ["fisher", "synflow", "grasp"])
def test_saliences_of_products_are_refused(salience):
    model = get_peft_model(tied_qwen2(), SpftConfig(target_modules=BOTH, salience=salience, samples=2))
    with pytest.raises(SpftError, match=rf"`salience: {salience}` needs .* embedding \(model.embed_tokens\)"):
        select_mask(model, [token_batch()])


class Bag(nn.Module):
    """An embedding with options of torch's, of which one token is padding."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.out = nn.Embedding(19, 6, **options), nn.Linear(6, 3)

    def forward(self, ids):
        return self.out(self.rows(ids)).tanh()


@pytest.mark.parametrize("options", [{"padding_idx": -2}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_options_of_the_embedding(options):
    model = get_peft_model(Bag(**options), SpftConfig(density=0.5, target_modules=["rows"], init_weights=False))
    twin = Bag(**options)
    layer = adapted_layers(model)["rows"]
    with torch.no_grad():
        twin.rows.weight += layer.get_delta_weight("default")
    ids = torch.tensor([[1, 17, 17, 3], [17, 3, 3, 3]])
    for each in (model, twin):
        each(ids).square().sum().backward()
    expected = twin.rows.weight.grad
    expected = (expected.to_dense() if expected.is_sparse else expected).view(-1)
    got = layer.spft_values["default"].grad
    assert (got - expected[layer.storage_positions(layer.mask("default"))]).abs().max() <= 1e-6
    assert got.any()


def test_what_computes_something_else_is_refused_by_name():
    with pytest.raises(TypeError, match=r"`rows` has `max_norm: 1.0`, by which its forward pass changes"):
        get_peft_model(Bag(max_norm=1.0), SpftConfig(target_modules=["rows"]))

    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 1)

    model = tied_qwen2()
    model.stranger = nn.Module()
    model.stranger.weight = model.lm_head.weight
    with pytest.raises(TypeError, match=r"`stranger \(tied to lm_head\)` is a Module, which is not supported"):
        get_peft_model(model, SpftConfig(target_modules=["lm_head"]))
    model = Bag()
    model.rows = Shifted(19, 6)
    with pytest.raises(TypeError, match=r"`rows` is a Shifted, which is not supported"):
        get_peft_model(model, SpftConfig(target_modules=["rows"]))


@pytest.mark.parametrize("key", ["exclude_modules", "modules_to_save"])
def test_tied_modules_are_not_parted(key):
    with pytest.raises(SpftError, match=r"takes lm_head, and .* names model.embed_tokens, but the model ties the two"):
        get_peft_model(tied_qwen2(), SpftConfig(target_modules=["lm_head"], **{key: ["embed_tokens"]}))
    model = get_peft_model(tiny_llama(), SpftConfig(target_modules=["lm_head"], **{key: ["embed_tokens"]}))
    assert outside(model) == {"lm_head"}


def test_an_embedding_keeps_what_models_read_of_it():
    model = with_adapter(tiny_llama(), target_modules=BOTH)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, SpftEmbedding)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (67, 36, None)
    assert embedding.weight.shape == (67, 36)
