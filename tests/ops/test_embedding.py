"""The embedding op against autograd through a dense W + S."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_spft.ops.embedding import Lookup, embed, embedding_values_grad, row_gradients
from axolotl_spft.ops.mask.csr import mask_from_positions, positions
from axolotl_spft.ops.reference import dense_delta
from axolotl_spft.ops.weight.scatter import add_at_
from tests.interpreter import DEVICE

TOKENS, WIDTH = 23, 7


def _case(dtype: torch.dtype, density: float = 0.3, values_dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    at = torch.randperm(TOKENS * WIDTH, generator=generator)[: int(density * TOKENS * WIDTH)].sort().values
    # rows that hold nothing, the first and the last among them
    at = at[((at // WIDTH) % 5 != 0) & (at // WIDTH < TOKENS - 1)]
    mask = mask_from_positions(at.to(DEVICE), TOKENS, WIDTH)
    weight = torch.randn(TOKENS, WIDTH, generator=generator).to(DEVICE, dtype)
    values = torch.randn(len(at), generator=generator).to(DEVICE, values_dtype)
    ids = torch.randint(0, TOKENS, (3, 11), generator=generator)
    ids[0] = 4
    return ids.to(DEVICE), weight, values, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rows_have_the_bits_of_the_sum_in_place(dtype):
    ids, weight, values, mask = _case(dtype)
    before = weight.clone()
    got = embed(ids, weight, values, mask)
    assert torch.equal(weight, before)
    add_at_(weight, mask, values)
    assert got.dtype == dtype and torch.equal(got, F.embedding(ids, weight))


@pytest.mark.parametrize("lookup", [Lookup(), Lookup(padding_idx=4), Lookup(scale_grad_by_freq=True), Lookup(6, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_autograds(lookup, dtype):
    ids, weight, values, mask = _case(dtype)
    values.requires_grad_()
    dense = (weight.float() + dense_delta(values, mask, WIDTH)).detach().requires_grad_()
    grad_y = torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    F.embedding(ids, dense, lookup.padding_idx, scale_grad_by_freq=lookup.scale_grad_by_freq).backward(grad_y.float())
    got = embedding_values_grad(grad_y, ids, mask, lookup, torch.float32)
    assert (got - dense.grad.view(-1)[positions(mask, WIDTH)]).abs().max() <= 1e-5
    tokens, rows = row_gradients(grad_y, ids, lookup)
    assert torch.equal(tokens, (ids if lookup.padding_idx is None else ids[ids != lookup.padding_idx]).unique())
    assert (rows - dense.grad[tokens]).abs().max() <= 1e-5


def test_nothing_to_look_up_and_nothing_held():
    _, weight, values, mask = _case(torch.float32)
    none = torch.empty(2, 0, dtype=torch.int64, device=DEVICE)
    assert embed(none, weight, values, mask).shape == (2, 0, WIDTH)
    # of tokens whose rows hold no entry, or that are padding alone
    for ids, lookup in (
        (torch.zeros(2, 3), Lookup()),
        (torch.full((2, 3), 4), Lookup(padding_idx=4)),
        (none, Lookup()),
    ):
        ids = ids.to(DEVICE, torch.int64)
        grads = embedding_values_grad(torch.ones(*ids.shape, WIDTH, device=DEVICE), ids, mask, lookup, torch.bfloat16)
        assert grads.dtype == torch.bfloat16 and grads.shape == values.shape and not grads.any()


@pytest.mark.parametrize("wrong", [-1, TOKENS])
def test_a_token_outside_of_the_vocabulary_is_an_error(wrong):
    _, weight, values, mask = _case(torch.float32)
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            embed(torch.tensor([1, wrong]), weight, values, mask)


def test_nothing_has_the_size_of_the_vocabulary():
    tokens, width = 5000, 16
    at = torch.arange(0, tokens * width, 3)
    mask = mask_from_positions(at, tokens, width)
    weight, values = torch.randn(tokens, width), torch.randn(len(at))
    ids = torch.randint(0, tokens, (2, 9))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        embed(ids, weight, values, mask)
        embedding_values_grad(torch.randn(2, 9, width), ids, mask, Lookup(), torch.float32)
    assert largest == len(at)
