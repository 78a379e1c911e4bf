"""The custom op against the plain reference: output and every gradient."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.frozen import frozen_linear
from axolotl_spft.ops.linear import Delta, kept_columns, register_owner, sparse_linear
from axolotl_spft.ops.mask import plan as plan_module
from axolotl_spft.ops.mask.csr import mask_from_positions, positions, used_columns
from axolotl_spft.ops.mask.plan import make_plan
from axolotl_spft.ops.reference import sparse_linear as reference_linear


class DenseOwner:
    """Owns a weight and makes W + S afresh."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def plain_weight(self):
        return nullcontext(self.weight)

    @contextmanager
    def effective_weight(self, values, delta):
        weight = self.weight.clone()
        weight.view(-1)[positions(delta.mask, weight.shape[1])] += values.to(weight.dtype)
        yield weight


def random_case(out_features, in_features, nnz, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64).to(dtype)
    at = torch.randperm(out_features * in_features, generator=generator)[:nnz].sort().values
    mask = mask_from_positions(at, out_features, in_features)
    values = torch.randn(nnz, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(2, 5, in_features, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(out_features, generator=generator, dtype=torch.float64).to(dtype)
    return weight, mask, values.requires_grad_(), x.requires_grad_(), bias.requires_grad_()


def delta_of(mask, in_features, *args, **kwargs):
    return Delta(mask, make_plan(mask, in_features, *args, multiple=1, **kwargs))


def linear(x, bias, values, delta, owner):
    return sparse_linear(x, kept_columns(x, delta.plan), bias, values, delta, owner, register_owner(owner))


# columns of x that backward is given: those that the mask uses, more than these, or all
KEPT = {"used": 1.0, "shared": 1.0, "all": 0.0}


@pytest.fixture(params=KEPT)
def kept(request, monkeypatch):
    monkeypatch.setattr(plan_module, "KEEP_COLUMNS_UP_TO", KEPT[request.param])
    return request.param


def shared_columns(mask, in_features, kept):
    """What `make_plan` is told of other layers."""
    some = torch.cat([used_columns(mask, in_features), torch.arange(0, in_features, 3)]).unique()
    return some if kept == "shared" else None


SHAPES = [(13, 17, 20), (7, 3, 21), (1, 9, 1), (9, 1, 5), (33, 31, 2), (16, 24, 300)]


@pytest.mark.parametrize(("out_features", "in_features", "nnz"), SHAPES)
@pytest.mark.parametrize("block_entries", [5, 2**24])
def test_gradcheck(out_features, in_features, nnz, block_entries, kept):
    weight, mask, values, x, bias = random_case(out_features, in_features, nnz)
    delta = delta_of(mask, in_features, block_entries, columns=shared_columns(mask, in_features, kept))
    assert (delta.plan.columns is None) == (kept == "all")
    owner = DenseOwner(weight)

    def function(x, bias, values):
        return linear(x, bias, values, delta, owner)

    torch.testing.assert_close(function(x, bias, values), reference_linear(x, weight, bias, values, mask))
    assert torch.autograd.gradcheck(function, (x, bias, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_reference_within_rounding(dtype):
    weight, mask, values, x, bias = random_case(33, 29, 101, dtype)
    owner = DenseOwner(weight)
    y = linear(x, bias, values, delta_of(mask, 29), owner)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = (y, *torch.autograd.grad(y, (x, bias, values), grad_y))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, bias, values)]
    # W + S is rounded once to the weight's dtype, as a stored weight would be
    total = reference_linear(torch.eye(29, dtype=torch.float64), weight.double(), None, wide[2], mask).t()
    rounded = total + (total.to(dtype).double() - total).detach()
    expected_y = torch.nn.functional.linear(wide[0], rounded, wide[1])
    expected = (expected_y, *torch.autograd.grad(expected_y, wide, grad_y.double()))
    tolerance = 4 * torch.finfo(dtype).eps
    for one, other in zip(got, expected):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_opcheck(kept):
    weight, mask, values, x, bias = random_case(13, 17, 20)
    plan = make_plan(mask, 17, 40, multiple=1, columns=shared_columns(mask, 17, kept))
    owner = DenseOwner(weight)
    arguments = (x, kept_columns(x, plan), bias, values, *mask, None, *plan, register_owner(owner))
    torch.library.opcheck(torch.ops.spft.linear, arguments)
    torch.library.opcheck(torch.ops.spft.select_columns, (x.detach(), torch.tensor([3, 0], dtype=torch.int32)))


def test_backward_keeps_only_the_used_columns_of_x():
    weight, _, _, x, _ = random_case(64, 48, 1, torch.float32)
    mask = mask_from_positions(torch.tensor([3, 48 + 3, 48 + 7, 200 * 8 + 7]), 64, 48)
    values = torch.zeros(mask.nnz, requires_grad=True)
    owner = DenseOwner(weight)
    delta = delta_of(mask, 48)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, None, values, delta, owner)
    floats = [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() > mask.nnz]
    assert [tuple(tensor.shape) for tensor in floats] == [(10, 3)]


def test_an_input_of_another_width_is_refused_before_its_columns_are_read():
    _, mask, _, x, _ = random_case(13, 17, 5)
    plan = delta_of(mask, 17).plan
    with pytest.raises(RuntimeError, match=r"16 features .*not 17"):
        kept_columns(x[..., :16], plan)


def test_a_gradient_of_the_gradient_is_refused():
    weight, mask, values, x, bias = random_case(13, 17, 20)
    y = linear(x, bias, values, delta_of(mask, 17), DenseOwner(weight))
    (grad_x,) = torch.autograd.grad(y.square().sum(), (x,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_frozen_values_and_inputs_get_no_gradient():
    weight, mask, values, x, _ = random_case(13, 17, 20)
    owner = DenseOwner(weight)
    delta = delta_of(mask, 17)
    y = linear(x.detach(), None, values, delta, owner)
    (only,) = torch.autograd.grad(y.sum(), (values,))
    assert only.shape == values.shape
    number = register_owner(owner)
    y = sparse_linear(x, None, None, values.detach(), delta, owner, number)
    (only,) = torch.autograd.grad(y.sum(), (x,))
    assert only.shape == x.shape
    assert not sparse_linear(x.detach(), None, None, values.detach(), delta, owner, number).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_output_may_be_changed_in_place(dtype, with_bias, frozen):
    weight, mask, values, x, bias = random_case(13, 17, 20, dtype)
    owner, delta = DenseOwner(weight), delta_of(mask, 17)
    number, bias = register_owner(owner), bias if with_bias else None

    def output():
        return frozen_linear(x, bias, len(weight), owner, number) if frozen else linear(x, bias, values, delta, owner)

    wanted = (x,) if frozen else (x, values)
    expected = torch.autograd.grad((2 * output()).relu().sum(), wanted)
    y = output()
    y *= 2
    for got, right in zip(torch.autograd.grad(torch.relu_(y).sum(), wanted), expected, strict=True):
        assert torch.equal(got, right)


def test_compiled_with_an_input_that_is_not_contiguous():
    weight, mask, values, _, bias = random_case(13, 40, 20, torch.float32)
    owner, delta = DenseOwner(weight), delta_of(mask, 40)
    x = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    number = register_owner(owner)

    def output(x):
        x = x.transpose(1, 2)
        return sparse_linear(x, kept_columns(x, delta.plan), bias, values, delta, owner, number)

    compiled = torch.compile(output, backend="inductor", fullgraph=True)
    gradients = (torch.autograd.grad(function(x).sin().sum(), (x, values, bias)) for function in (compiled, output))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_compiled_graph_that_outlives_its_layer_is_a_clear_error():
    weight, mask, values, x, _ = random_case(13, 17, 20)
    owner = DenseOwner(weight)
    plan = make_plan(mask, 17, multiple=1)
    kept = kept_columns(x, plan)
    y = torch.ops.spft.linear(x, kept, None, values, *mask, None, *plan, register_owner(owner))
    del owner
    with pytest.raises(SpftError, match="no longer exists: keep the model while its graphs run"):
        y.sum().backward()
