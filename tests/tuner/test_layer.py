"""One sparse layer: what happens between its forward and its backward pass, copies, casts, shared weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.ops.reference import sparse_linear as reference_linear
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner import SpftLinear
from tests.interpreter import DEVICE
from tests.models import logits, same_weights, tiny_llama, token_batch, weights_of, with_adapter


def make_layer(base: str = "linear", dtype=torch.float32, adapters=("default",)) -> SpftLinear:
    torch.manual_seed(0)
    inner = nn.Linear(13, 7) if base == "linear" else Conv1D(7, 13)
    nn.init.normal_(inner.bias)
    layer = SpftLinear(inner.to(dtype).requires_grad_(False), adapters[0])
    for number, name in enumerate(adapters):
        layer.add_empty_adapter(name)
        at = torch.randperm(91)[: 20 + number].sort().values
        layer.set_mask(name, mask_from_positions(at, 7, 13), torch.randn(20 + number, dtype=dtype))
    layer.set_adapter(adapters[0])
    return layer


def reference(layer: SpftLinear, x: torch.Tensor, name: str = "default", values: torch.Tensor | None = None):
    values = layer.spft_values[name] if values is None else values
    return reference_linear(x, layer.get_base_weight(), layer.get_base_layer().bias, values, layer.mask(name))


def inputs(rows: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 13, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_output_and_gradients_equal_the_reference(base, x_requires_grad):
    layer = make_layer(base)
    x = inputs().requires_grad_(x_requires_grad)
    wanted = (layer.spft_values["default"], *([x] if x_requires_grad else []))
    got = layer(x)
    got_grads = torch.autograd.grad(got.square().sum(), wanted)
    expected = reference(layer, x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(got_grads, torch.autograd.grad(expected.square().sum(), wanted)):
        torch.testing.assert_close(one, other)


def test_switching_adapters_between_forward_and_backward():
    layer = make_layer(adapters=("a", "b"))
    x = inputs().requires_grad_()
    both = [layer.spft_values["a"], layer.spft_values["b"]]
    layer.set_adapter(["a"])
    y_a = layer(x)
    layer.set_adapter(["b"])
    y_b = layer(x)
    for values in both:
        values.requires_grad_(True)
    got_a = torch.autograd.grad(y_a.square().sum(), (x, both[0]))
    assert torch.equal(layer(x), y_b)  # backward left the active adapter in place
    got_b = torch.autograd.grad(y_b.square().sum(), (x, both[1]))
    for name, values, got in (("a", both[0], got_a), ("b", both[1], got_b)):
        expected = torch.autograd.grad(reference(layer, x, name).square().sum(), (x, values))
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other)


def test_backward_while_disabled_leaves_the_base_weight():
    layer = make_layer()
    before = layer.get_base_weight().clone()
    x = inputs().requires_grad_()
    y = layer(x)
    layer.enable_adapters(False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(layer.get_base_layer().weight, before)
    (expected,) = torch.autograd.grad(reference(layer, x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_values_changed_between_forward_and_backward_are_an_error():
    layer = make_layer()
    y = layer(inputs().requires_grad_())
    with torch.no_grad():
        layer.spft_values["default"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_layer_that_runs_twice_before_backward():
    layer = make_layer()
    values = layer.spft_values["default"]
    one, two = inputs(seed=1), inputs(seed=2)
    (got,) = torch.autograd.grad((layer(one).square() + layer(two)).sum(), values)
    (expected,) = torch.autograd.grad((reference(layer, one).square() + reference(layer, two)).sum(), values)
    torch.testing.assert_close(got, expected)


def test_forward_after_an_optimizer_step_sees_the_new_values():
    layer = make_layer()
    optimizer = SparseAdamW([layer.spft_values["default"]], lr=0.1)
    before = layer(inputs())
    before.sum().backward()
    optimizer.step()
    after = layer(inputs())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, reference(layer, inputs()))


def through_torch_save(layer: SpftLinear) -> SpftLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_torch_save])
def test_a_copy_is_independent(make_copy):
    layer = make_layer()
    y = layer(inputs())
    twin = make_copy(layer)
    with torch.no_grad():
        twin.spft_values["default"].mul_(2)
    assert not torch.equal(twin(inputs()), y)
    assert torch.equal(layer(inputs()), y)
    before = layer.get_base_weight().clone()
    assert torch.equal(twin.get_base_weight(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_casts_the_base_weight_itself(dtype):
    layer = make_layer()
    plain = copy.deepcopy(layer.get_base_layer())
    layer(inputs())
    layer.to(dtype)
    assert torch.equal(layer.get_base_weight(), plain.weight.to(dtype))
    x = inputs().to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cast", ["data", "base layer"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_base_weight_that_is_cast_by_itself(cast, dtypes):
    """As `peft.prepare_model_for_kbit_training` does, after passes that wrote W + S."""
    model = with_adapter(tiny_llama(dtypes[0]))
    weights = weights_of(tiny_llama(dtypes[0]))
    logits(model)
    for layer in adapted_layers(model).values():
        if cast == "data":
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtypes[1])
        else:
            layer.base_layer.to(dtypes[1])
    for _ in range(2):
        # the second is written by all layers at once
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = logits(model)
    for name, layer in adapted_layers(model).items():
        original = weights[f"{name}.weight"].to(dtypes[1])
        assert torch.equal(layer.get_base_weight(), original)
        expected = original.float() + layer.get_delta_weight("default").float()
        unit = torch.eye(layer.in_features, dtype=dtypes[1], device=DEVICE)
        torch.testing.assert_close(layer(unit).t(), expected.to(dtypes[1]), atol=0, rtol=2e-2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert (logits(model.merge_and_unload()) - got).abs().max() <= 2e-2 * got.abs().max()


def test_an_evaluation_in_inference_mode_before_training():
    model = with_adapter(tiny_llama(), adapter_name="a")
    model.add_adapter("b", SpftConfig(init_weights=False, density=0.1))
    model.base_model.set_adapter(["a", "b"])
    with torch.inference_mode():
        expected = model(**token_batch()).loss
    loss = model(**token_batch()).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(layer.spft_values[name].grad.any() for layer in adapted_layers(model).values() for name in "ab")


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13)])
def test_a_trained_bias_has_its_gradient_for_inputs_of_any_shape(shape):
    layer = make_layer()
    bias = layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(shape, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).square().sum(), bias)
    (expected,) = torch.autograd.grad(reference(layer, x).square().sum(), bias)
    torch.testing.assert_close(got, expected)


def test_double_precision_stays_double_under_autocast():
    layer, x = make_layer(dtype=torch.float64), inputs().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, reference(layer, x))


def test_in_place_writing_makes_no_copy_of_the_weight():
    layer = make_layer()
    weight = layer.get_base_layer().weight
    assert layer.in_place
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == weight.numel():
                made.append(out.untyped_storage().data_ptr())
            return out

    layer(inputs())
    with Watch():
        layer(inputs().requires_grad_())
    assert set(made) <= {weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("shared", ["parameter", "memory"])
def test_a_weight_that_a_head_shares_with_an_embedding_has_one_delta(shared):
    model = tiny_llama(tie_word_embeddings=True)
    if shared == "memory":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data)
    before = weights_of(model)
    adapted = with_adapter(model, target_modules=["lm_head", "q_proj"])
    assert "lm_head" not in adapted_layers(adapted) and adapted_layers(adapted)["model.embed_tokens"].in_place
    adapted(**token_batch()).loss.backward()
    got = logits(adapted)

    twin = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        for name, other in adapted_layers(adapted).items():
            twin.get_submodule(name).weight += other.get_delta_weight("default")
    assert (got - logits(twin)).abs().max() <= 1e-5 * got.abs().max()

    adapted.merge_adapter()
    assert (logits(adapted) - got).abs().max() <= 1e-5 * got.abs().max()
    adapted.unmerge_adapter()
    adapted.unload()
    assert same_weights(model, before)


def test_two_layers_with_one_weight():
    torch.manual_seed(0)
    one, two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    two.weight = one.weight
    model = with_adapter(nn.Sequential(one, nn.Tanh(), two), target_modules=["0", "2"], density=0.3)
    before = one.weight.detach().clone()
    x = torch.randn(3, 6)
    got = model(x)
    first, second = adapted_layers(model).values()
    expected = torch.tanh(x @ (before + first.get_delta_weight("default")).t())
    expected = expected @ (before + second.get_delta_weight("default")).t()
    torch.testing.assert_close(got, expected)
    assert torch.equal(one.weight, before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(one.weight, before)


def test_an_empty_layer_trains_saves_and_merges(tmp_path):
    """Global selection of one single value leaves every other layer without any."""
    model = get_peft_model(tiny_llama(), SpftConfig(num_values=1, scope="global", salience="magnitude"))
    select_mask(model, None)
    layers = adapted_layers(model)
    assert sorted(layer.mask("default").nnz for layer in layers.values()) == [0] * (len(layers) - 1) + [1]
    optimizer = SparseAdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**token_batch()).loss.backward()
        optimizer.step()
    got = logits(model)
    assert not torch.equal(got, logits(tiny_llama()))
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), got)
    assert torch.equal(logits(model.merge_and_unload()), got)


def test_data_parallel_is_refused():
    with pytest.raises(SpftError, match="start one process per GPU"):
        make_layer()._replicate_for_data_parallel()


def test_delta_weight_is_the_dense_delta():
    layer = make_layer()
    delta = layer.get_delta_weight("default")
    assert delta.shape == (7, 13)
    assert int((delta != 0).sum()) == 20
    expected = layer.base_layer(inputs()) + inputs() @ delta.t()
    torch.testing.assert_close(layer(inputs()), expected)


def test_a_state_dict_holds_the_base_weight_itself():
    layer = make_layer()
    before = layer.get_base_weight().clone()
    y = layer(inputs())
    state = copy.deepcopy(layer.state_dict())
    assert torch.equal(state["base_layer.weight"], before)
    layer.load_state_dict(state)
    assert torch.equal(layer(inputs()), y)


def test_loading_another_base_weight_moves_what_revert_puts_back():
    layer = make_layer()
    layer(inputs())
    new = torch.randn(7, 13)
    layer.load_state_dict({**copy.deepcopy(layer.state_dict()), "base_layer.weight": new})
    torch.testing.assert_close(layer(inputs()), reference(layer, inputs()))
    assert torch.equal(layer.get_base_weight(), new)


def test_a_mask_with_another_number_of_values_is_refused():
    layer = make_layer()
    before = layer(inputs())
    with pytest.raises(SpftError, match=r"adapter `default`: 3 values for a mask of 5"):
        layer.set_mask("default", mask_from_positions(torch.arange(5), 7, 13), torch.ones(3))
    assert torch.equal(layer(inputs()), before)
