"""Tests of Triton kernels on machines without a GPU, in Triton's interpreter.

Triton decides whether it interprets when it is imported, which other tests do too. So a test marked ``kernel`` runs in
a process of its own with ``TRITON_INTERPRET=1``, one for all those of a file, and counts here with its outcome there.
Where there is a GPU it runs on it like any other test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from axolotl_spft.ops.backends.dispatch import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_outcomes: dict[Path, dict[str, tuple[str, str]]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Replace the call of a kernel's test by its outcome in the interpreter's process."""
    if pyfuncitem.get_closest_marker("kernel") is None or DEVICE == "cuda" or interpreting():
        return None
    if pyfuncitem.path not in _outcomes:
        _outcomes[pyfuncitem.path] = _run_interpreted(pyfuncitem)
    outcome, text = _outcomes[pyfuncitem.path].get(pyfuncitem.name, ("failure", "it did not run in the interpreter"))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(f"in Triton's interpreter:\n{text}", pytrace=False)
    return True


def _run_interpreted(pyfuncitem: pytest.Function) -> dict[str, tuple[str, str]]:
    """Outcome and text of each selected test of the item's file, by name."""
    tests = [
        item.nodeid
        for item in pyfuncitem.session.items
        if item.path == pyfuncitem.path and item.get_closest_marker("kernel") is not None
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        run = subprocess.run(
            command,
            cwd=pyfuncitem.config.rootpath,
            env=environment | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            pytest.fail(f"Triton's interpreter did not start:\n{run.stdout}{run.stderr}", pytrace=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {case.get("name"): _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for found in case:
        if found.tag in ("failure", "error", "skipped"):
            return found.tag, f"{found.get('message')}\n{found.text}"
    return "passed", ""


def repair_bfloat16() -> None:
    """Give the interpreter of Triton 3.2 to 3.9 the hardware's bfloat16.

    It keeps bfloat16 as uint16 and so multiplies the bits in ``tl.dot``, and it truncates where the hardware rounds to
    the nearest even number.
    """
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    own_dot, own_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        widened = (self.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
        return own_dot(self, *widened, *rest)

    def create_fp_trunc(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return own_cast(self, source, target)
        rounded = torch.from_numpy(numpy.array(source.data, dtype=numpy.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = create_dot, create_fp_trunc
