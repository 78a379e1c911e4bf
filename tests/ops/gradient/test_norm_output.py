"""Columns of a norm's output that are made again have the bits of the output, and only where that is safe."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from axolotl_spft import SpftConfig
from axolotl_spft.bench.kept import kept_for_backward
from axolotl_spft.ops.gradient.norm_output import norm_output
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import shared_input
from tests.interpreter import DEVICE
from tests.models import tiny_llama, tiny_qwen2, token_batch, with_adapter

LOW = [torch.bfloat16, torch.float16]
DTYPES = [*LOW, torch.float32]
NORMS = [LlamaRMSNorm, Qwen3RMSNorm, Gemma2RMSNorm]
FEATURES = 37
# from a GPU save_on_cpu keeps copies, so that each of three readers finds nothing to share and asks
AGAIN = [False] * (3 if DEVICE == "cuda" else 1)
SOME = torch.tensor([0, 3, 4, 20, 36, 36], dtype=torch.int32, device=DEVICE)


def norm_of(kind, dtype=torch.float32, trained=False) -> nn.Module:
    norm = kind(FEATURES).to(dtype)
    nn.init.normal_(norm.weight)
    return norm.requires_grad_(trained)


def hidden(dtype=torch.float32, tokens=(2, 11)) -> torch.Tensor:
    """What a block adds up: a tensor that the graph made."""
    return 3 * torch.randn(*tokens, FEATURES).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def seed(on_device):
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("columns", [SOME, None], ids=["some", "all"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("given", "weight", "computed"),
    [*[(dtype, dtype, dtype) for dtype in DTYPES]]
    + [(torch.float32, torch.float32, low) for low in LOW]
    + [(low, torch.float32, low) for low in LOW],
)
def test_columns_have_the_bits_of_the_output(kind, columns, trained, given, weight, computed):
    x = norm_of(kind, weight, trained)(hidden(given))
    found = norm_output(x, columns, computed)
    assert found is not None
    expected = x.detach().reshape(-1, FEATURES).to(computed)
    expected = expected if columns is None else expected[:, columns.long()]
    got = found.columns()
    assert got.dtype == found.dtype == computed
    assert torch.equal(got, expected)


class Halves(nn.Module):
    """As a norm, but in two parts."""

    def forward(self, x):
        return torch.cat([x, x * 2], -1)


@pytest.mark.parametrize(
    "other",
    [nn.LayerNorm(FEATURES), nn.SiLU(), nn.Identity(), Halves()],
    ids=lambda module: type(module).__name__,
)
def test_other_outputs_are_not_taken_for_it(other):
    assert norm_output(other.to(DEVICE).requires_grad_(False)(hidden()), SOME, torch.float32) is None


def test_products_of_other_shapes_are_not_taken_for_it():
    h, weight, column = hidden(), torch.randn(FEATURES), torch.rand(2, 11, 1)
    ours = weight * (h * column)
    assert norm_output(ours, SOME, torch.float32) is None  # h * column needs no gradient for column: it keeps no h
    gate = torch.rand(2, 11, FEATURES, requires_grad=True) * 1
    for x in (weight * (h * gate), gate * (h * gate), h * weight, weight * h.sum(-1, keepdim=True), h * 2.0):
        assert norm_output(x, SOME, torch.float32) is None


def test_what_is_not_the_untouched_output_is_not_taken_for_it():
    norm = norm_of(LlamaRMSNorm)
    x = norm(hidden())
    with torch.no_grad():
        x.add_(1)
    assert norm_output(x, SOME, torch.float32) is None
    for touched in (norm(hidden()) + 1, norm(hidden())[:, 1:], norm(hidden()).transpose(0, 1), norm(hidden()).detach()):
        assert norm_output(touched, SOME, torch.float32) is None
    with torch.no_grad():
        assert norm_output(norm(hidden()), SOME, torch.float32) is None
    assert norm_output(norm(torch.randn(3, FEATURES)), SOME, torch.float32) is None


def test_what_compiled_autograd_would_take_away_is_not_taken_for_it():
    import torch._dynamo

    x = norm_of(LlamaRMSNorm)(hidden())
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert norm_output(x, SOME, torch.float32) is None
    assert norm_output(x, SOME, torch.float32) is not None


def test_double_precision_is_not_taken_for_it():
    norm = norm_of(LlamaRMSNorm)
    norm.weight.data = norm.weight.data.double()
    x = norm(hidden())
    assert x.dtype == torch.float64
    assert norm_output(x, SOME, torch.float64) is None
    # rounding a float32 output to double is no rounding, but the kernels have no such result
    assert norm_output(norm_of(LlamaRMSNorm)(hidden()), SOME, torch.float64) is None


@pytest.mark.parametrize("given", [torch.float64, torch.bfloat16])
def test_roundings_that_the_kernels_do_not_have_are_not_taken_for_it(given):
    x = norm_of(LlamaRMSNorm, given)(hidden(given))
    assert norm_output(x, SOME, torch.float32) is None


def test_a_norm_whose_weight_was_released_is_not_taken_for_it():
    # as ZeRO-3 does at the end of the norm's forward pass
    norm = norm_of(LlamaRMSNorm)
    x = norm(hidden())
    norm.weight.data = torch.empty(0)
    assert norm_output(x, SOME, torch.float32) is None


def test_a_weight_that_is_released_later_is_remembered():
    norm = norm_of(LlamaRMSNorm)
    x = norm(hidden())
    found = norm_output(x, SOME, torch.float32)
    norm.weight.data = torch.empty(0)
    assert torch.equal(found.columns(), x.detach().view(-1, FEATURES)[:, SOME.long()])


def test_columns_are_made_once_for_all_readers_and_dropped():
    found = norm_output(norm_of(LlamaRMSNorm)(hidden()), SOME, torch.float32)
    found.readers = 3
    for _ in range(2):  # a graph that is kept runs backward again
        first, second, third = (found.columns() for _ in range(3))
        assert first is second is third
        assert found._made is None
        fresh = found.columns()
        assert fresh is not first
        found.columns(), found.columns()


# --- in layers


class Block(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.before, self.norm = nn.Linear(FEATURES, FEATURES), norm
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(FEATURES, 8, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.norm(self.before(x))
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


def adapted_block(norm=None, nnz=30):
    model = get_peft_model(
        Block(norm or norm_of(LlamaRMSNorm)), SpftConfig(target_modules=["q_proj", "k_proj", "v_proj"])
    )
    for layer in adapted_layers(model).values():
        chosen = torch.randperm(8 * FEATURES)[:nnz].sort().values
        layer.set_mask("default", mask_from_positions(chosen, 8, FEATURES), torch.randn(nnz))
    return model


def gradients(model, run, **options) -> list[torch.Tensor]:
    run().backward(**options)
    found = [layer.spft_values["default"].grad for layer in adapted_layers(model).values()]
    model.zero_grad()
    return found


def assert_same_bits(got, expected):
    assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.fixture
def answers(monkeypatch) -> list[bool]:
    """Whether a layer's input was recognized, for each time that a layer asked."""
    answered = []

    def ask(*arguments):
        found = norm_output(*arguments)
        answered.append(found is not None)
        return found

    monkeypatch.setattr(shared_input, "norm_output", ask)
    return answered


@pytest.mark.parametrize("nnz", [30, 250])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_bits_of_kept_columns(answers, kind, dtype, nnz):
    model = adapted_block(norm_of(kind), nnz).to(dtype)
    x = torch.randn(5, 7, FEATURES, dtype=dtype, requires_grad=True)
    got = gradients(model, lambda: model(x).float().square().sum())
    assert answers == [True]
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    assert answers == [True, *AGAIN]
    assert_same_bits(got, gradients(model, lambda: y.float().square().sum()))


def test_autocast_makes_them_in_its_own_dtype(answers):
    model, x = adapted_block(), torch.randn(5, 7, FEATURES, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = gradients(model, lambda: model(x).float().square().sum())
        with torch.autograd.graph.save_on_cpu():
            y = model(x)
    assert answers == [True, *AGAIN]
    assert_same_bits(got, gradients(model, lambda: y.float().square().sum()))


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)
    loss = model(x).square().sum()
    first = gradients(model, lambda: loss, retain_graph=True)
    assert_same_bits(first, gradients(model, lambda: loss))


def test_the_gradient_of_some_layers_only_is_theirs():
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().sum())
    values = [layer.spft_values["default"] for layer in adapted_layers(model).values()]
    loss = model(x).square().sum()
    (got,) = torch.autograd.grad(loss, values[1], retain_graph=True)
    assert torch.equal(got, expected[1])
    assert_same_bits(torch.autograd.grad(loss, values), expected)


def test_a_change_of_what_the_norm_keeps_is_an_error():
    norm, x = norm_of(LlamaRMSNorm), hidden()
    model = adapted_block(norm)
    kept = x * 1
    loss = model.base_model.model.q_proj(norm(kept)).sum()
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_alike_in_both_passes(answers, reentrant):
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().sum())
    answers.clear()
    got = gradients(model, lambda: checkpoint(model, x, use_reentrant=reentrant).square().sum())
    # reentrant: first without gradients, which asks for nothing, then as without checkpointing
    assert set(answers) == {reentrant}
    assert_same_bits(got, expected)


def same_without(monkeypatch, model, run) -> None:
    """The gradients of ``run`` are those of copies that are kept."""
    got = gradients(model, run)
    with monkeypatch.context() as patch:
        patch.setattr(shared_input, "norm_output", lambda *_: None)
        assert_same_bits(got, gradients(model, run))


@pytest.mark.parametrize("inside", [("q_proj",), ("k_proj",), ("q_proj", "k_proj"), ("v_proj",), ("k_proj", "v_proj")])
@pytest.mark.parametrize("passes", [1, 2])
def test_readers_inside_and_outside_of_a_checkpoint(monkeypatch, inside, passes):
    model, inputs = adapted_block(), [torch.randn(5, FEATURES, requires_grad=True) for _ in range(2)]
    block = model.base_model.model

    def loss(x):
        x = block.norm(block.before(x))
        q, k, v = (
            checkpoint(layer, x, use_reentrant=False) if name in inside else layer(x)
            for name, layer in block.named_children()
            if name.endswith("_proj")
        )
        return (q * k + v).square().sum()

    same_without(monkeypatch, model, lambda: sum([loss(x) for x in inputs[:passes]]))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [(lambda t: 2 * t, lambda t: t / 2), (torch.neg, torch.neg), (torch.Tensor.clone, torch.Tensor.clone)],
    ids=["doubled", "negated", "cloned"],
)
def test_hooks_that_keep_other_tensors(monkeypatch, pack, unpack):
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)

    def run():
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return model(x).square().sum()

    gradients(model, lambda: model(x).square().sum())
    same_without(monkeypatch, model, run)


def test_hooks_that_can_unpack_once_only(monkeypatch):
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)

    def run():
        kept = {}

        def pack(tensor):
            placeholder = torch.zeros_like(tensor)
            kept[id(placeholder)] = tensor, placeholder
            return placeholder

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda placeholder: kept.pop(id(placeholder))[0]):
            return model(x).square().sum()

    same_without(monkeypatch, model, run)


@pytest.mark.parametrize("change", ["output", "weight"])
def test_what_a_modules_hook_changes_unseen(monkeypatch, answers, change):
    norm = norm_of(LlamaRMSNorm)
    model, x = adapted_block(norm), torch.randn(5, FEATURES, requires_grad=True)

    def hook(_, inputs, output):
        (output if change == "output" else norm.weight).data.mul_(1.5)

    norm.register_forward_hook(hook)
    weight = norm.weight.detach().clone()

    def run():
        norm.weight.data.copy_(weight)
        return model(x).square().sum()

    same_without(monkeypatch, model, run)
    # looked at by the first layer, and never again
    assert answers == [True]


def test_a_layer_behind_a_detached_output(monkeypatch):
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)
    block = model.base_model.model

    def run():
        y = block.norm(block.before(x))
        block.q_proj(y)
        k, v = block.k_proj(y.detach()).square().sum(), block.v_proj(y).square().sum()
        v.backward()
        return k + block.q_proj(block.norm(block.before(x))).square().sum()

    same_without(monkeypatch, model, run)


def test_models_work_when_deep_copied_with_a_graph_alive():
    model, x = adapted_block(), torch.randn(5, FEATURES, requires_grad=True)
    loss = model(x).square().sum()
    twin = copy.deepcopy(model)
    assert_same_bits(gradients(model, lambda: loss), gradients(twin, lambda: twin(x).square().sum()))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_behind_a_norm_keep_nothing(make, dtype):
    model = with_adapter(make(dtype), density=0.3)
    model.enable_input_require_grads()
    batch = token_batch(rows=3, length=9)
    behind = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert kept_for_backward(model, batch, behind).by_adapted == 0
    assert kept_for_backward(model, batch, ["o_proj"]).by_adapted > 0
