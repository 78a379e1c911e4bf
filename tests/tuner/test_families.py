"""Every family of models: adapted, selected, trained, saved, loaded, merged and generating, in float and in 4 bits."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.ops.gradient.norm_output import NormOutput
from axolotl_spft.ops.linear import kept_columns
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from axolotl_spft.tuner.shared_input import SharedInput
from integration.families.page import PAGE, page
from tests.families import FAMILIES, Family
from tests.interpreter import DEVICE
from tests.models import same_weights, weights_of
from tests.tuner.test_quantized import dequantized, quantized_layer

BASES = ("float", "4bit")
SAMPLES = 4


def load(family: Family, folder, base: str) -> nn.Module:
    if base == "float":
        return family.make().to(DEVICE)
    kind = AutoModelForImageTextToText if family.images else AutoModelForCausalLM
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        # bitsandbytes' own evaluation on some CPUs refuses layers as narrow as these, which no adapter is put on
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )  # fmt: skip
    return kind.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager", device_map=DEVICE,
    )  # fmt: skip


def filled(model: PeftModel) -> dict[str, SpftLinear]:
    return {name: layer for name, layer in adapted_layers(model).items() if layer.mask("default").nnz}


class Case(NamedTuple):
    """A family on one kind of base; the model has its mask and random values."""

    family: Family
    base: str
    folder: object
    model: PeftModel
    before: dict[str, torch.Tensor]

    def batch(self, **options) -> dict[str, torch.Tensor]:
        return {name: tensor.to(DEVICE) for name, tensor in self.family.batch(**options).items()}

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.batch(seed=5)).logits

    def gradients(self, model: PeftModel) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**self.batch(seed=3)).loss.backward()
        layers = filled(model)
        assert layers
        return {name: layer.spft_values["default"].grad.clone() for name, layer in layers.items()}


@pytest.fixture(
    scope="module",
    params=[pytest.param((family, base), id=f"{family.name}-{base}") for family in FAMILIES for base in BASES],
)
def case(request, tmp_path_factory) -> Case:
    family, base = request.param
    folder = tmp_path_factory.mktemp("model")
    if base == "4bit":
        family.make().save_pretrained(folder)
    plain = load(family, folder, base)
    before = weights_of(plain)
    model = get_peft_model(plain, SpftConfig(density=0.2, samples=SAMPLES, exclude_modules=family.exclude))
    case = Case(family, base, folder, model, before)
    select_mask(model, [case.batch(seed=1), case.batch(seed=2)])
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        mask = layer.mask("default")
        layer.set_mask("default", mask, 0.05 * torch.randn(mask.nnz))
    return case


def is_left(name: str, family: Family) -> bool:
    return any(part in name for part in family.left.split())


def test_all_linear_takes_every_linear_layer_but_the_head(case):
    """By the family's list, and by the rule: all of Linear and Conv1D, but the output head and what is excluded."""
    plain = case.family.make()
    head = plain.get_output_embeddings()
    linear = {name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    expected = {name for name in linear if plain.get_submodule(name) is not head and not is_left(name, case.family)}
    found = adapted_layers(case.model)
    assert set(found) == expected
    # Jamba's router is a linear layer in some releases of transformers, and has a parameter of its own in others
    routers = {"router"} - {name.rpartition(".")[2] for name in linear}
    assert {name.rpartition(".")[2] for name in found} == set(case.family.targets.split()) - routers
    # every one of them is reached by a gradient
    empty = {name.rpartition(".")[2] for name, layer in found.items() if not layer.mask("default").nnz}
    assert empty == ({case.family.uncalled} if case.family.uncalled and case.base == "float" else set())
    # what else has two dimensions or more is named by the family, too
    tables = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Embedding)}
    matrices = {name for name, parameter in plain.named_parameters() if parameter.ndim >= 2}
    others = matrices - tables - {f"{name}.weight" for name in expected} - {"lm_head.weight"}
    left = [name for name in others if not is_left(name, case.family)]
    assert {name.split(".")[-2] for name in left} <= routers & set(case.family.targets.split())
    quantized = {layer.quantization_backend is not None for layer in found.values()}
    assert quantized == {case.base == "4bit" and case.family.quantized}


def test_gradients_are_those_of_dense_training_at_the_mask(case):
    model = copy.deepcopy(case.model).train()
    got = case.gradients(model)
    if case.base == "float":
        twin = copy.deepcopy(case.model).merge_and_unload()
    else:
        plain = dequantized(copy.deepcopy(case.model).unload())
        twin = get_peft_model(plain, SpftConfig(target_modules=list(adapted_layers(model))))
        for one, other in zip(adapted_layers(model).values(), adapted_layers(twin).values(), strict=True):
            other.set_mask("default", one.mask("default"), one.spft_values["default"].detach())
        twin = twin.merge_and_unload()
    twin.requires_grad_(False)
    for name in got:
        twin.get_submodule(name).weight.requires_grad_(True)
    twin.train()(**case.batch(seed=3)).loss.backward()
    for name, layer in filled(model).items():
        gradient = twin.get_submodule(name).weight.grad
        expected = gradient.flatten()[layer.storage_positions(layer.mask("default")).long()]
        assert expected.abs().max() > 0, name
        assert (got[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_what_layers_keep_of_their_inputs_changes_no_gradient(case, monkeypatch):
    """Readers of one tensor keep one copy, or none behind a norm that can make it again; the bits are the same."""
    model = copy.deepcopy(case.model).train()
    keep, kept = SharedInput.keep, []

    def noted(self, x, inputs, plan):
        found = keep(self, x, inputs, plan)
        # alive, so that none takes the place of another in memory
        kept.append((self, found))
        return found

    monkeypatch.setattr(SharedInput, "keep", noted)
    got = case.gradients(model)
    names = {id(layer._shared_input): set() for layer in filled(model).values()}
    for name, layer in filled(model).items():
        names[id(layer._shared_input)].add(name.rpartition(".")[2])
    copies: dict[int, set[int]] = {}
    for shared, found in kept:
        copies.setdefault(id(shared), set()).add(id(found))
    together = {
        " ".join(sorted(names[key])) for key, found in copies.items() if len(names[key]) > 1 and len(found) == 1
    }
    assert together == {" ".join(sorted(group.split())) for group in case.family.together}
    assert any(isinstance(found, NormOutput) for _, found in kept) == case.family.normed
    monkeypatch.setattr(SharedInput, "keep", lambda self, x, inputs, plan: kept_columns(inputs, plan))
    expected = case.gradients(copy.deepcopy(case.model).train())
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_trained_saved_loaded_merged_and_generating(case, tmp_path):
    model = copy.deepcopy(case.model).train()
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**case.batch(seed=1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]

    model.eval()
    adapted = case.logits(model)
    tokens = generated(case, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(case.family, case.folder, case.base), tmp_path).eval()
    assert torch.equal(case.logits(again), adapted)
    assert torch.equal(generated(case, again), tokens)

    with model.disable_adapter():
        assert not torch.equal(case.logits(model), adapted)
    sums = {
        name: layer.get_base_weight().float() + layer.get_delta_weight("default").float()
        for name, layer in adapted_layers(model).items()
    }
    model.merge_adapter()
    merged = case.logits(model)
    model.unmerge_adapter()
    assert torch.equal(case.logits(model), adapted)
    plain = again.merge_and_unload()
    assert not any("spft" in name for name in plain.state_dict())
    assert torch.equal(case.logits(plain), merged)
    if case.base == "float" or not case.family.quantized:
        assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
        assert torch.equal(generated(case, plain), tokens)
    else:
        for name, total in sums.items():
            expected = quantized_layer(total, None, "4bit", torch.float32)
            assert torch.equal(plain.get_submodule(name).weight, expected.weight), name
        generated(case, plain)
    assert same_weights(model.unload(), case.before)


def generated(case: Case, model: nn.Module) -> torch.Tensor:
    batch = case.batch(seed=4)
    del batch["labels"]
    return model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_the_page_shows_these_families():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m integration.families.page`"
