"""`adapter_names`: each row of a batch is what its adapter gives by itself."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from axolotl_spft import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from tests.interpreter import DEVICE
from tests.models import ARCHITECTURES, VOCABULARY, same_weights, tiny_llama, token_batch, weights_of, with_adapter
from tests.tuner.test_quantized import quantize

NAMES = ["b", "__base__", "a", "b", "a"]


def tiny_t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 26, "d_kv": 13, "d_ff": 42, "num_heads": 2, "num_layers": 2, "vocab_size": VOCABULARY}
    return AutoModelForSeq2SeqLM.from_config(
        T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ).to(DEVICE)


def with_two(base: nn.Module, **options) -> PeftModel:
    """Adapters a and b, of other positions; b does not reach all modules that a does."""
    model = with_adapter(base, seed=1, adapter_name="a", **options)
    torch.manual_seed(2)
    second = [name for name in adapted_layers(model) if "v_proj" not in name and "layers.1" not in name]
    model.add_adapter("b", SpftConfig(density=0.2, target_modules=second, init_weights=False, **options))
    return model.eval()


def rows(number: int = len(NAMES), length: int = 7) -> dict[str, torch.Tensor]:
    ids = token_batch(rows=number, length=length)["input_ids"].clamp(min=2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one_by_one(model: PeftModel, run) -> dict[str, torch.Tensor]:
    """What all rows give with each adapter."""
    found = {}
    with model.disable_adapter():
        found["__base__"] = run(model)
    for name in ("a", "b"):
        model.set_adapter(name)
        found[name] = run(model)
    model.set_adapter("a")
    return found


def assert_rows_are_those_of(expected: dict[str, torch.Tensor], got: torch.Tensor, tolerance: float, each=1) -> None:
    names = [name for name in NAMES for _ in range(each)]
    assert len(got) == len(names)
    for row, name in enumerate(names):
        length = min(got.shape[1], expected[name].shape[1])  # rows that ended sooner are padded
        one, other = got[row, :length].float(), expected[name][row, :length].float()
        assert (one - other).abs().max() <= tolerance * other.abs().max(), (row, name)


@torch.no_grad()
def test_what_rows_differ_by_is_rounding():
    model = with_two(ARCHITECTURES["llama"]()).double()
    expected = one_by_one(model, lambda model: model(**rows()).logits)
    got = model(**rows(), adapter_names=NAMES).logits
    assert got.dtype == torch.float64
    for row, name in enumerate(NAMES):
        assert (got[row] - expected[name][row]).abs().max() <= 1e-12 * expected[name][row].abs().max()


@pytest.mark.parametrize("base", [*ARCHITECTURES, "llama-4bit", "llama-bfloat16"])
@torch.no_grad()
def test_each_row_is_that_of_its_adapter(base):
    architecture, _, kind = base.partition("-")
    plain = ARCHITECTURES[architecture](torch.bfloat16 if kind == "bfloat16" else torch.float32)
    model = with_two(quantize(plain, "4bit") if kind == "4bit" else plain)
    before = weights_of(model)

    def run(model):
        return model(**rows()).logits

    expected = one_by_one(model, run)
    different = [(expected[one] - expected[other]).abs().max() for one, other in ("ab", ("a", "__base__"))]
    tolerance = 0.1 if kind == "bfloat16" else 1e-5
    assert min(different) > 3 * tolerance * expected["a"].abs().max()
    got = model(**rows(), adapter_names=NAMES).logits
    assert_rows_are_those_of(expected, got, tolerance)
    # the active adapter is what it was, and the weights too
    assert torch.equal(run(model), expected["a"])
    assert same_weights(model, before)
    with model.disable_adapter():
        assert torch.equal(model(**rows(), adapter_names=NAMES).logits, expected["__base__"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5], ids=["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation(make, options):
    model = with_two(make(), task_type="SEQ_2_SEQ_LM" if make is tiny_t5 else "CAUSAL_LM")

    def run(model, **names):
        tokens = model.generate(**rows(), **names, **options, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return nn.functional.pad(tokens, (0, 20 - tokens.shape[1]))

    expected = one_by_one(model, run)
    assert not torch.equal(expected["a"], expected["b"])
    each = options.get("num_return_sequences", 1)
    assert_rows_are_those_of(expected, run(model, adapter_names=NAMES), 0, each)
    # as a setting of the model, too
    if options.get("num_beams") == 3:
        model.generation_config.num_beams = options.pop("num_beams")
        assert_rows_are_those_of(expected, run(model, adapter_names=NAMES), 0)
        options["num_beams"] = 3


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_embeddings_and_heads(tied):
    targets = {"target_modules": ["embed_tokens", "lm_head", "down_proj"], "density": 0.2, "init_weights": False}
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), SpftConfig(**targets), "a")
    model.add_adapter("b", SpftConfig(**targets))
    model.eval()
    expected = one_by_one(model, lambda model: model(**rows()).logits)
    assert_rows_are_those_of(expected, model(**rows(), adapter_names=NAMES).logits, 1e-5)


def test_modules_to_save_of_each_row():
    model = with_two(tiny_llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, head in model.base_model.model.lm_head.modules_to_save.items():
            head.weight.mul_({"a": -1, "b": 2}[name])
        expected = one_by_one(model, lambda model: model(**rows()).logits)
        assert_rows_are_those_of(expected, model(**rows(), adapter_names=NAMES).logits, 1e-5)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_what_cannot_be_is_refused_by_name(task_type):
    model = with_two(tiny_llama(), task_type=task_type)
    for names, said in (
        (["a"] * 4, r"Length of `adapter_names` should be .* got 4 and 5"),
        (["a"] * 10, r"Length of `adapter_names` should be .* got 10 and 5"),
        (["a"], r"Length of `adapter_names` should be .* got 1 and 5"),
        (["a", "c", "d", "a", "b"], r"non-existing adapter\(s\): c, d"),
        ("a", r"`adapter_names: 'a'` must be a list"),
        ([], r"`adapter_names: \[\]` must be a list"),
    ):
        with pytest.raises(SpftError, match=said):
            model(**rows(), adapter_names=names)
    with pytest.raises(SpftError, match="when the model is in training mode"):
        model.train()(**rows(), adapter_names=NAMES)
    with pytest.raises(SpftError, match=r"Length of `adapter_names` should be .* got 1 and 5"):
        model.eval().generate(**rows(), adapter_names=["a"], max_new_tokens=1)
    model.merge_adapter(["b"])
    with pytest.raises(SpftError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(**rows(), adapter_names=NAMES)
    model.unmerge_adapter()
    model(**rows(), adapter_names=NAMES)
    # no hook is left
    hooks = [module._forward_pre_hooks_with_kwargs for module in model.base_model.model.model.modules()]
    assert not any(hooks)


def test_routed_experts_get_tokens_of_any_row():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x):
            return self.experts[0](x[:2]).sum() + self.experts[1](x[2:]).sum()

    model = get_peft_model(Routed(), SpftConfig(target_modules=["0"], density=0.5, init_weights=False)).eval()
    with pytest.raises(SpftError, match=r"experts\.0 get tokens of any row"):
        model(torch.randn(4, 6), adapter_names=["default"] * 4)
    assert model(torch.randn(4, 6), adapter_names=["__base__"] * 4).isfinite()
