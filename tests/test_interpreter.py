"""The way kernel tests run: their outcome counts, and the interpreter's bfloat16 does need repair."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from axolotl_spft.ops.backends.dispatch import interpreting
from tests.interpreter import DEVICE

_PROGRAM = """
import torch, triton, triton.language as tl
from tests.interpreter import repair_bfloat16
@triton.jit
def kernel(source, rounded, product, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    low = tl.load(source + at).to(tl.bfloat16)
    tl.store(rounded + at, low)
    tl.store(product + at, tl.dot(low, low))
def check():
    source, product = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 16)
    rounded = torch.zeros(16, 16, dtype=torch.bfloat16)
    kernel[(1,)](source, rounded, product, 16)
    low = source.to(torch.bfloat16)
    print(torch.equal(rounded, low), torch.allclose(product, low.float() @ low.float(), atol=1e-5))
check()
repair_bfloat16()
check()
"""


@pytest.mark.kernel
def test_kernel_tests_run_in_the_interpreter_or_on_a_gpu():
    assert interpreting() or DEVICE == "cuda"


def test_the_interpreters_bfloat16_needs_its_repair(tmp_path, pytestconfig):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(pytestconfig.rootpath)}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "False False\nTrue True\n"
