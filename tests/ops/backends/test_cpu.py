"""The C kernels equal plain torch: bit for bit where they copy and add, within float32 rounding where they multiply."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.backends import cpu, cpu_library
from axolotl_spft.ops.backends.dispatch import use_c
from axolotl_spft.ops.gradient.columns import select_columns, select_normed_columns
from axolotl_spft.ops.gradient.sampled import sampled_values_grad
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions
from axolotl_spft.ops.mask.plan import make_plan
from axolotl_spft.ops.weight.scatter import add_at_, restore_, write_sum_
from axolotl_spft.ops.weight.sums import Sum, can_collect, collect_sums, restore_sums_, write_sums_
from axolotl_spft.tuner.layer import SpftLinear

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
DTYPES = [torch.bfloat16, torch.float32]
# out_features, in_features, nnz: one entry, all entries, rows with none, more rows and entries than go together
SHAPES = [(1, 1, 1), (5, 7, 35), (61, 67, 200), (3, 1024, 300), (130, 40, 900)]


# what compilers are told to do without, so that every way of multiplying is compiled somewhere
WITHOUT = {
    "nothing": [],
    "AVX512-BF16": ["-mno-avx512bf16"],
    "AVX512": ["-mno-avx512bf16", "-mno-avx512f"],
    "AVX": ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"],
}


@pytest.fixture(params=WITHOUT, scope="module")
def processor(request):
    """Compiles for this machine, and as for lesser ones."""
    with pytest.MonkeyPatch.context() as patch:
        if WITHOUT[request.param]:
            if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
                pytest.skip("this machine has none")
            patch.setenv("CC", " ".join([COMPILER, *WITHOUT[request.param]]))
        cpu_library.library.cache_clear()
        yield request.param
        cpu_library.library.cache_clear()


def random_mask(out_features, in_features, nnz, wide=False):
    chosen = torch.randperm(out_features * in_features)[:nnz].sort().values
    mask = mask_from_positions(chosen, out_features, in_features)
    return Mask(mask.columns.to(torch.int32), mask.row_offsets) if wide else mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 8, 33, 1061])
@pytest.mark.parametrize("multiple", [1, 16])
def test_sampled_product_is_the_dense_one_at_the_mask(processor, dtype, shape, tokens, multiple):
    mask = random_mask(*shape, wide=multiple == 16)
    plan = make_plan(mask, shape[1], multiple=multiple)
    x, grad_y = (torch.randn(tokens, size).to(dtype) for size in (shape[1], shape[0]))
    kept = select_columns(x, plan.columns)
    dense = grad_y.double().t() @ x.double()
    sizes = grad_y.double().t().abs() @ x.double().abs()
    rows = torch.repeat_interleave(mask.row_offsets.diff())
    at = rows, mask.columns.to(torch.int64)
    got = sampled_values_grad(grad_y, kept, mask, plan, torch.float32, backend="c")
    assert got.dtype == torch.float32
    assert ((got - dense[at]).abs() <= 2**-21 * sizes[at]).all()
    by_rows = kept.clone(memory_format=torch.contiguous_format)
    assert torch.equal(got, sampled_values_grad(grad_y, by_rows, mask, plan, torch.float32, backend="c"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    mask = random_mask(130, 400, 3000)
    plan = make_plan(mask, 400)
    x, grad_y = torch.randn(1100, 400).to(dtype), torch.randn(1100, 130).to(dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            kept = select_columns(x, plan.columns, backend="c")
            found.append(sampled_values_grad(grad_y, kept, mask, plan, torch.float32, backend="c"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 133])
def test_columns_are_copied(processor, dtype, tokens):
    x, columns = torch.randn(tokens, 50).to(dtype), torch.tensor([0, 3, 4, 31, 49, 49])
    for index in (torch.int32, torch.int64):
        got = select_columns(x, columns.to(index), backend="c")
        assert torch.equal(got, x[:, columns])
        assert got.t().is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("columns", [[0, 3, 4, 20, 36, 36], None], ids=["some", "all"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 13, 300])
def test_columns_of_a_norm_have_the_bits_of_torch(processor, dtype, rounds, columns, tokens):
    h, scale = torch.randn(tokens, 37), torch.rand(tokens, 1)
    if tokens:
        h[0, :4], scale[0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]), 1
    weight = torch.randn(37 if columns is None else len(columns))
    columns = None if columns is None else torch.tensor(columns, dtype=torch.int32)
    arguments = (h, scale, weight, columns, dtype, rounds)
    expected = select_normed_columns(*arguments, backend="torch")
    assert expected.shape == (tokens, len(weight))
    for backend in ("c", "auto"):
        got = select_normed_columns(*arguments, backend=backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_written_with_the_bits_of_torch(processor, dtype, shape, transposed, values_dtype):
    mask = random_mask(*shape, wide=transposed)
    weight = torch.randn(shape[1::-1] if transposed else shape[:2]).to(dtype)
    originals, values = torch.randn(shape[2]).to(dtype), (torch.randn(shape[2]) * 0.1).to(values_dtype)
    for write, kept, given in ((write_sum_, True, [values]), (add_at_, False, [values]), (restore_, True, [])):
        found = []
        for backend in ("c", "torch"):
            changed, before = weight.clone(), [originals.clone()] if kept else []
            write(changed, mask, *before, *given, transposed, backend=backend)
            found.append((changed, *before))
        assert all(map(torch.equal, *found))
        assert not torch.equal(found[0][0], weight)


def test_many_sums_are_written_with_the_bits_of_each(processor):
    sums = []
    for dtype in [*DTYPES, torch.bfloat16]:
        for shape in SHAPES:
            for transposed in (False, True):
                mask = random_mask(*shape, wide=transposed)
                weight = torch.randn(shape[1::-1] if transposed else shape[:2]).to(dtype)
                sums.append(Sum(weight, mask, torch.randn(shape[2]).to(dtype), torch.randn(shape[2]) * 0.1, transposed))
    nothing = torch.zeros(0, dtype=torch.bfloat16)
    sums.append(Sum(torch.ones(3, 4, dtype=torch.bfloat16), random_mask(3, 4, 0), nothing, nothing.float(), False))
    expected, before = ([each.weight.clone() for each in sums] for _ in range(2))
    for written, each in zip(expected, sums):
        write_sum_(written, *each[1:], backend="torch")
    originals = [each.originals.clone() for each in sums]
    assert all(can_collect(each.weight, each.values) for each in sums)
    collected = collect_sums(sums)
    assert len(collected) == 4
    for _ in range(2):
        for alike in collected:
            write_sums_(alike)
        assert all(torch.equal(each.weight, weight) for each, weight in zip(sums, expected))
        assert all(torch.equal(each.originals, kept) for each, kept in zip(sums, originals))
        for alike in collected:
            restore_sums_(alike)
        assert all(torch.equal(each.weight, weight) for each, weight in zip(sums, before))
        for each in sums:
            each.originals.zero_()
    for write in (write_sums_, restore_sums_):
        with pytest.raises(SpftError, match="'torch' cannot write many sums at once"):
            write(collected[0], backend="torch")


def test_rounding_of_ties_infinities_and_nan(processor):
    step = 2.0**-7
    originals = torch.tensor([1.0, 1.0 + step, 3e38, torch.inf, 1.0, torch.nan, -0.0], dtype=torch.bfloat16)
    values = torch.tensor([step / 2, step / 2, 3e38, -torch.inf, torch.nan, 1.0, -0.0])
    mask, found = mask_from_positions(torch.arange(7), 1, 7), []
    for backend in ("c", "torch"):
        weight = originals.view(1, 7).clone()
        write_sum_(weight, mask, torch.zeros_like(originals), values, backend=backend)
        found.append(weight.view(torch.int16))
    finite = [0, 1, 2, 6]
    assert torch.equal(found[0][0, finite], found[1][0, finite])
    assert found[0].view(torch.bfloat16).isnan().tolist() == found[1].view(torch.bfloat16).isnan().tolist()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_what_is_put_back_keeps_every_bit(processor, dtype, bits):
    info = torch.iinfo(bits)
    # zeros of both signs, subnormals, infinities, and NaN with a payload, quiet and signaling
    originals = torch.tensor([0, info.min, 1, info.min + 1, info.max, info.max - 1, -1], dtype=bits)
    signaling = torch.tensor([torch.inf], dtype=dtype).view(bits) + 1
    originals = torch.cat([originals, signaling]).view(dtype)
    mask, weight = mask_from_positions(torch.arange(8), 2, 4), torch.ones(2, 4, dtype=dtype)
    restore_(weight, mask, originals, backend="c")
    assert torch.equal(weight.view(bits).flatten(), originals.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_on_a_cpu_runs_them_and_computes_what_it_does_without(dtype, monkeypatch):
    def run():
        generator = torch.Generator().manual_seed(0)
        base = nn.Linear(128, 96, bias=False, dtype=dtype)
        with torch.no_grad():
            base.weight.copy_(torch.randn(96, 128, generator=generator))
        layer = SpftLinear(base.requires_grad_(False), "default")
        rows, columns = torch.arange(96), torch.arange(0, 128, 4)
        at = (rows[:, None] * 128 + columns)[(rows[:, None] + columns // 4) % 16 == 0]
        layer.set_mask("default", mask_from_positions(at, 96, 128), torch.randn(at.numel(), generator=generator))
        x = torch.randn(2, 20, 128, generator=generator).to(dtype).requires_grad_()
        y = layer(x)
        grad_y = torch.randn(y.shape, generator=generator).to(dtype)
        return y, *torch.autograd.grad(y, (x, layer.spft_values["default"]), grad_y)

    calls = set()
    for name in ("select_columns", "sampled_values_grad", "write_"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, name=name, kernel=kernel: calls.add(name) or kernel(*args))
    got = run()
    assert calls == {"select_columns", "sampled_values_grad", "write_"}
    calls.clear()
    monkeypatch.setattr("axolotl_spft.ops.backends.dispatch.library", lambda _: None)
    expected = run()
    assert not calls
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=torch.finfo(dtype).eps, atol=2**-16)


def test_other_tensors_are_left_to_torch():
    for tensor in (torch.zeros(2, dtype=torch.float16), torch.zeros(2, 3).t(), torch.zeros(2, device="meta")):
        assert not use_c("auto", tensor)
        with pytest.raises(SpftError, match="'c' cannot run"):
            use_c("c", tensor)
    assert not use_c("torch", torch.zeros(2))
    with pytest.raises(SpftError, match=r"torch\.float64 on cpu"):
        add_at_(torch.zeros(1, 1), random_mask(1, 1, 1), torch.zeros(1, dtype=torch.float64), backend="c")


def test_what_does_not_fit_is_refused_before_its_memory_is_read():
    mask = random_mask(6, 8, 10)
    plan, values = make_plan(mask, 8), torch.zeros(10)
    x, grad_y = torch.randn(5, 8), torch.randn(5, 6)
    kept = select_columns(x, plan.columns)
    for bad in ((grad_y[:4], kept), (grad_y, kept[:, 1:]), (grad_y[:, 1:].contiguous(), kept), (grad_y, kept.double())):
        with pytest.raises(ValueError, match="do not fit"):
            sampled_values_grad(*bad, mask, plan, backend="c")
    weight = torch.zeros(6, 8)
    for bad in ((weight, values[1:], values), (weight, values, values[1:]), (weight[1:], values, values)):
        with pytest.raises(ValueError, match="do not fit"):
            write_sum_(bad[0], mask, *bad[1:], backend="c")
    with pytest.raises(ValueError, match="do not fit"):
        write_sum_(weight, mask, values.to(torch.bfloat16), values, backend="c")
    assert not weight.any()
    elsewhere = Mask(*(tensor.to("meta") for tensor in mask))
    with pytest.raises(SpftError, match=r"`columns` .* lies on the meta device"):
        write_sum_(weight, elsewhere, values, values, backend="c")
    with pytest.raises(RuntimeError, match="on the CPU, and its sparse delta on meta"):
        select_columns(x, torch.zeros(2, dtype=torch.int32, device="meta"), backend="c")
    h, scale, columns = torch.randn(3, 8), torch.rand(3, 1), torch.tensor([0, 3], dtype=torch.int32)
    for bad in ((h[:2], scale, torch.randn(2)), (h, scale, torch.randn(1))):
        with pytest.raises(ValueError, match="do not fit"):
            select_normed_columns(*bad, columns, torch.float32, False, backend="c")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("cc -O'", "No closing quotation"),
        ("sh -c 'printf \"\\\\377\" >&2; exit 1' sh", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_without_a_compiler_a_warning_says_so_once_and_torch_goes_on(compiler, reason, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    cpu_library.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=reason) as warnings:
            for _ in range(2):
                assert not use_c("auto", torch.zeros(2))
        assert len(warnings) == 1
        x = torch.randn(3, 4)
        assert torch.equal(select_columns(x, torch.tensor([1, 2])), x[:, 1:3])
    finally:
        cpu_library.library.cache_clear()


def test_threads_are_those_of_torch():
    code = """
import torch
from axolotl_spft.ops.gradient.columns import select_columns
torch.randn(2000, 2000).sum()
select_columns(torch.randn(2000, 2000), torch.arange(1000), backend="c")
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("there is no /proc")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1"]
