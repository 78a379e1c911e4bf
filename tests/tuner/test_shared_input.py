"""Layers that read one tensor keep one copy of its columns, and none that backward does not need."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from axolotl_spft import SpftConfig
from axolotl_spft.ops.linear import kept_columns
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions
from axolotl_spft.ops.mask.plan import MULTIPLE
from axolotl_spft.tuner import shared_input
from axolotl_spft.tuner.shared_input import group_by_input
from tests.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")

# columns are kept in multiples of 16: each column that is named below stands for 16 of them
BAND = MULTIPLE
TOKENS, WIDTH, HEADS = 6, 20 * BAND, 8 * BAND


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, HEADS, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(HEADS, WIDTH, bias=False)

    def forward(self, x, other=None):
        other = x if other is None else other
        return self.o_proj(self.q_proj(x) * self.k_proj(other) + self.v_proj(other))


def mask_of(bands: list[int], out_features: int = HEADS, in_features: int = WIDTH) -> Mask:
    columns = [band * BAND + column for band in sorted(bands) for column in range(BAND)]
    return mask_from_positions(3 * in_features + torch.tensor(columns), out_features, in_features)


MASKS = {
    "q_proj": mask_of([1, 2]),
    "k_proj": mask_of([2, 3, 5]),
    "v_proj": mask_of([9]),
    "o_proj": mask_of([4], WIDTH, HEADS),
}


def adapted(masks=MASKS):
    torch.manual_seed(0)
    model = get_peft_model(Attention(), SpftConfig(target_modules=list(MASKS)))
    for name, mask in masks.items():
        model.get_submodule(f"base_model.model.{name}").set_mask("default", mask, torch.randn(mask.nnz))
    return model


def kept_columns_of(model, *inputs) -> tuple[torch.Tensor, list[int]]:
    """The output, and how many bands of the inputs' columns each copy has that is kept for backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own and tensor.shape[0] == TOKENS and tensor.shape[-1] not in (HEADS, WIDTH):
            kept[storage] = tensor.shape[-1] // BAND
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(*inputs)
    return y, sorted(kept.values())


def gradients(model, *inputs) -> dict[str, torch.Tensor]:
    y, _ = kept_columns_of(model, *inputs)
    return gradients_of(model, y)


def gradients_of(model, y) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def dense_gradients(model, *inputs) -> dict[str, torch.Tensor]:
    """The same from the merged model with all of its weights trained."""
    twin = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    twin(*inputs).square().sum().backward()
    found = {}
    for name in MASKS:
        layer = model.get_submodule(f"base_model.model.{name}")
        at = layer.storage_positions(layer.mask("default"))
        found[f"base_model.model.{name}.spft_values.default"] = twin.get_submodule(name).weight.grad.flatten()[at]
    return found


def assert_right(model, *inputs) -> None:
    got, expected = gradients(model, *inputs), dense_gradients(model, *inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_one_copy_for_all_readers():
    model, x = adapted(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    _, kept = kept_columns_of(model, x)
    # the union of q, k and v, and o's own
    assert kept == [1, 5]
    assert_right(model, x)


class PostBackwardFunctionModule(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 passes each module's inputs on, by the same name."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_one_copy_for_readers_of_aliases():
    model, x = adapted(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    expected = gradients(model, x)
    for name in MASKS:
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.register_forward_pre_hook(lambda _, inputs: (PostBackwardFunctionModule.apply(inputs[0]),))
    _, kept = kept_columns_of(model, x * 1)
    assert kept == [1, 5]
    got = gradients(model, x * 1)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class OneBuffer(torch.autograd.Function):
    """As a CUDA graph, which writes each result to the same memory."""

    memory = torch.empty(TOKENS, WIDTH, device=DEVICE)

    @staticmethod
    def forward(ctx, x):
        return OneBuffer.memory.copy_(x).detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_what_was_kept_of_the_same_memory_is_not_that_of_the_next_pass():
    model = adapted()
    first, second = (torch.randn(TOKENS, WIDTH, requires_grad=True) for _ in range(2))
    expected = gradients(model, second)
    alive = model(OneBuffer.apply(first))
    got = gradients(model, OneBuffer.apply(second))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    del alive


def test_parts_of_one_tensor_are_not_taken_for_each_other():
    model = adapted()
    both = torch.randn(2 * TOKENS, WIDTH)
    layers = [model.get_submodule(f"base_model.model.{name}") for name in ("q_proj", "k_proj")]
    expected = []
    for layer, part in zip(layers, both.clone().split(TOKENS)):
        layer(part.clone()).square().sum().backward()
        expected.append(layer.spft_values["default"].grad.clone())
        layer.spft_values["default"].grad = None
    outputs = [layer(part) for layer, part in zip(layers, both.split(TOKENS))]
    sum(y.square().sum() for y in outputs).backward()
    for layer, gradient in zip(layers, expected):
        assert torch.equal(layer.spft_values["default"].grad, gradient)


def test_readers_of_different_tensors_keep_a_copy_each():
    model = adapted()
    inputs = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH, requires_grad=True)
    _, kept = kept_columns_of(model, *inputs)
    assert kept == [1, 5, 5]
    assert_right(model, *inputs)


def test_an_input_that_changed_in_place_is_another_input():
    model = adapted()
    x = torch.randn(TOKENS, WIDTH)
    layers = [model.get_submodule(f"base_model.model.{name}") for name in ("q_proj", "k_proj")]
    first = layers[0](x)
    x.add_(1)
    layers[1](x).square().sum().backward()
    expected = copy.deepcopy(layers[1])
    expected.spft_values["default"].grad = None
    expected(x.clone()).square().sum().backward()
    assert torch.equal(layers[1].spft_values["default"].grad, expected.spft_values["default"].grad)
    first.sum().backward()


def test_a_copy_lives_as_long_as_backward_needs_it():
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    shared = model.base_model.model.q_proj._shared_input
    y = model(x)
    assert shared._last.kept() is not None
    y.sum().backward()
    del y
    assert shared._last.kept() is None


def test_nothing_is_copied_without_gradients(monkeypatch):
    model = adapted()
    monkeypatch.setattr(shared_input, "kept_columns", None)
    with torch.no_grad():
        model(torch.randn(TOKENS, WIDTH))
    model.requires_grad_(False)
    model(torch.randn(TOKENS, WIDTH, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_copies_in_its_last_pass_only(monkeypatch, nested):
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    attention, copied = model.base_model.model, []
    expected = gradients(model, x)

    def counted(inputs, plan):
        copied.append(plan.columns.numel() // BAND)
        return kept_columns(inputs, plan)

    monkeypatch.setattr(shared_input, "kept_columns", counted)
    own, passes = attention.forward, 0

    def forward(x):
        nonlocal passes
        passes += 1
        return own(x)

    def inner(x):
        return checkpoint(forward, x, use_reentrant=False)

    y = checkpoint(inner if nested else forward, x, use_reentrant=False)
    assert not copied
    assert_same_bits(gradients_of(model, y), expected)
    assert passes == 2
    # of the three readers' input once, and of the last layer's own
    assert copied == [5, 1]


def test_a_selective_checkpoint_sees_the_same_operations_in_both_passes():
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    expected = gradients(model, x)

    def saves(_, function, *args, **kwargs):
        saved = function in (torch.ops.aten.mm.default, torch.ops.aten.index_select.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, saves)
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    assert_same_bits(gradients_of(model, y), expected)


def test_autocast_copies_in_its_own_dtype():
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, kept = kept_columns_of(model, x)
    assert kept == [1, 5]
    y.float().square().sum().backward()
    expected = dense_gradients(model, x)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).norm() < 0.05 * expected[name].norm()


def test_new_masks_and_other_adapters_change_what_is_kept():
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    assert kept_columns_of(model, x)[1] == [1, 5]
    model.base_model.model.v_proj.set_mask("default", mask_of([2, 3]), torch.randn(2 * BAND))
    assert kept_columns_of(model, x)[1] == [1, 4]
    assert_right(model, x)
    model.add_adapter("other", SpftConfig(target_modules=["k_proj"]))
    model.base_model.model.k_proj.set_mask("other", mask_of([7]), torch.randn(BAND))
    model.base_model.set_adapter(["default", "other"])
    _, kept = kept_columns_of(model, x)
    assert 5 in kept  # k's: 1, 2, 3, 5 and 7
    model.delete_adapter("other")
    model.set_adapter("default")
    assert_right(model, x)


def test_copies_of_a_model_share_among_themselves():
    model, x = adapted(), torch.randn(TOKENS, WIDTH)
    model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        readers = twin.base_model.model.q_proj._shared_input.readers
        assert readers[1] is twin.base_model.model.k_proj
        assert kept_columns_of(twin, x)[1] == [1, 5]
        assert_right(twin, x)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["a.q_proj", "a.k_proj", "a.o_proj", "b.v_proj"], [["a.q_proj", "a.k_proj"], ["a.o_proj"], ["b.v_proj"]]),
        (["m.gate_proj", "m.up_proj", "m.down_proj"], [["m.gate_proj", "m.up_proj"], ["m.down_proj"]]),
        (["c_attn", "w3", "w1"], [["c_attn"], ["w3", "w1"]]),
        ([], []),
    ],
)
def test_groups(names, groups):
    assert group_by_input(dict.fromkeys(names, 8)) == groups


def test_layers_of_different_widths_do_not_read_one_tensor():
    assert group_by_input({"q_proj": 8, "k_proj": 12, "v_proj": 12}) == [["q_proj"], ["k_proj", "v_proj"]]
