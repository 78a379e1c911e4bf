"""Every kernel compiles for its GPUs, which needs none: the interpreter checks neither types nor instructions."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
LOW = ["bf16", "fp16"]


def compiled(kernel, signature: dict[str, str], constants: dict, arch: int, divisible: tuple[str, ...] = (), **options):
    """The kernel as it is launched with pointers, and the integers ``divisible``, that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.fixture(params=[80, 90])
def arch(request, monkeypatch, tmp_path):
    from triton.backends import backends
    from triton.runtime.jit import JITFunction

    from axolotl_spft.ops.weight.triton_scatter import scatter_kernel

    if "nvidia" not in backends:
        pytest.skip("this triton has no NVIDIA backend")
    assert isinstance(scatter_kernel, JITFunction), "this process interprets kernels: run it without TRITON_INTERPRET"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return request.param


@pytest.mark.parametrize(
    ("dtype", "values", "column"),
    [("bf16", "bf16", "u16"), ("bf16", "fp32", "i32"), ("fp16", "fp32", "u16"), ("fp32", "fp32", "u16")],
)
def test_scatter(arch, dtype, values, column):
    from axolotl_spft.ops.weight.triton_scatter import scatter_kernel

    signature = {"weight": f"*{dtype}", "columns": f"*{column}", "row_offsets": "*i32", "originals": f"*{dtype}"}
    signature |= {"values": f"*{values}", "row_stride": "i32", "column_stride": "i32"}
    for keeping in (False, True):
        constants = {"KEEPING": keeping, "ADDING": True, "BLOCK": 128}
        ptx = compiled(scatter_kernel, signature, constants, arch, num_warps=1).asm["ptx"]
        # one rounding, to the nearest even number, by a conversion or in the sum itself
        assert bool(re.search(r"(cvt|fma)\.rn\.bf16|add(\.rn)?\.bf16", ptx)) == (dtype == "bf16")
    # originals that are put back keep their bits
    constants = {"KEEPING": False, "ADDING": False, "BLOCK": 128}
    assert not re.search(r"cvt\.\S*f|\b(add|fma)\S*f", compiled(scatter_kernel, signature, constants, arch).asm["ptx"])


@pytest.mark.parametrize("dtype", [*LOW, "fp32"])
def test_entries(arch, dtype):
    from axolotl_spft.ops.gradient.triton_entries import entries_kernel

    signature = {"block": f"*{dtype}", "columns": "*u16", "entries": "*fp32", "row_start": "i32", "n_columns": "i32"}
    signature |= dict.fromkeys(["offsets", "column_ranks"], "*i32")
    for some in (False, True):
        compiled(entries_kernel, signature, {"SOME_COLUMNS": some, "BLOCK": 512}, arch)


@pytest.mark.parametrize("dtype", [*LOW, "fp32"])
def test_columns(arch, dtype):
    from axolotl_spft.ops.gradient.triton_columns import columns_kernel

    for index in ("i32", "i64"):
        signature = {"x": f"*{dtype}", "columns": f"*{index}", "copy": f"*{dtype}"}
        signature |= dict.fromkeys(["tokens", "x_stride", "n_columns"], "i32")
        compiled(columns_kernel, signature, {"TOKENS": 8, "BLOCK": 256}, arch)


@pytest.mark.parametrize("dtype", [*LOW, "fp32"])
@pytest.mark.parametrize("some", [False, True])
def test_normed_columns(arch, dtype, some):
    from axolotl_spft.ops.gradient.triton_columns import normed_columns_kernel

    signature = dict.fromkeys(["h", "scale", "weight"], "*fp32") | {"columns": "*i32", "copy": f"*{dtype}"}
    signature |= dict.fromkeys(["tokens", "h_stride", "n_columns"], "i32")
    roundings = []
    for rounds in (False, True):
        constants = {"SOME": some, "ROUNDS": rounds, "TOKENS": 2, "BLOCK": 512}
        ptx = compiled(normed_columns_kernel, signature, constants, arch).asm["ptx"]
        roundings.append(len(re.findall(r"cvt\.rn\.b?f16", ptx)))
    # to the nearest even number: the result, and between the products too where that is asked for
    assert (0 < roundings[0] < roundings[1]) if dtype in LOW else roundings == [0, 0]


@pytest.mark.parametrize(("dtype", "values"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")])
def test_sums(arch, dtype, values):
    from axolotl_spft.ops.weight.triton_sums import sums_kernel

    signature = {"fields": "*i64", "groups": "*i32", "weight": f"*{dtype}", "columns": "*u16", "row_offsets": "*i32"}
    signature |= {"originals": f"*{dtype}", "values": f"*{values}"}
    for restoring in (False, True):
        constants = {"FIELDS": 9, "GROUP": 64, "RESTORING": restoring, "BLOCK": 128}
        compiled(sums_kernel, signature, constants, arch, num_warps=1)


@pytest.mark.parametrize("dtype", [*LOW, "fp32"])
@pytest.mark.parametrize("nested", [True, False])
def test_dequantize(arch, dtype, nested):
    from axolotl_spft.ops.weight.triton_dequantize import dequantize_kernel

    signature = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "weight": f"*{dtype}"}
    signature |= dict.fromkeys(["code", "nested_code", "nested_absmax", "offset"], "*fp32")
    signature |= {"n": "i32", "nested_size": "i32"}
    constants = {"NESTED": nested, "BYTES": 32, "GROUPS": 32}
    ptx = compiled(dequantize_kernel, signature, constants, arch, enable_fp_fusion=False).asm["ptx"]
    assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("dtype", [*LOW, "fp32"])
def test_tiles(arch, dtype):
    from axolotl_spft.ops.gradient.triton_values_grad import _CONFIGS, tiles_kernel

    integers = "tokens tokens_per_split grad_rows_stride x_stride n_columns nnz token_class grid_class"
    signature = {"grad_rows": f"*{dtype}", "x": f"*{dtype}", "words": "*i64", "grads": f"*{dtype}"}
    signature |= dict.fromkeys(["tile_rows", "tile_columns", "offsets", "slots"], "*i32")
    signature |= dict.fromkeys(integers.split(), "i32")
    config = _CONFIGS[0]
    constants = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "PRECISION": "ieee"} | config.kwargs
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    widths = ("grad_rows_stride", "x_stride", "n_columns")
    built = compiled(tiles_kernel.fn, signature, constants, arch, widths, **options)
    ptx = built.asm["ptx"]
    # memory is read 16 bytes at a time while the matrix units work
    assert re.search(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
    if dtype in LOW:
        assert not re.search(r"ld\.global\.(v4|\w*16)", ptx)
        assert ("wgmma" if arch == 90 else "mma.sync") in ptx
    assert built.metadata.shared < 100 * 1024


@pytest.mark.parametrize(("dtype", "writes_weight"), [("bf16", True), ("fp16", False), ("fp32", True)])
def test_adamw(arch, dtype, writes_weight):
    from axolotl_spft.optim.triton_adamw import adamw_kernel

    signature = dict.fromkeys(("values", "grads"), f"*{dtype}") | dict.fromkeys(("weight", "originals"), "*bf16")
    signature |= dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "step"), "*fp32")
    signature |= {"positions": "*i32", "n": "i32"}
    scalars = "lr log_beta1 log_beta2 beta1 beta2 rest1 rest2 keep eps"
    signature |= dict.fromkeys(scalars.split(), "fp32")
    compiled(adamw_kernel, signature, {"WRITES_WEIGHT": writes_weight, "BLOCK": 1024}, arch)
