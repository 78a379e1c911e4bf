"""The C kernels for CPUs, compiled by the machine's own C compiler when a process first needs them.

That takes half a second, and nothing of it is left on the disk: no cache can be stale, or wait for a process that was
killed. Where there is no compiler all goes on in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_NAMES = {torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32"}
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_PARAMETERS = {
    "select_columns": (_POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _INT),
    "select_normed_columns": (_POINTER, _POINTER, _POINTER, _INT, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _INT),
    "sampled_product": (_POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _POINTER, _INT, *[_POINTER] * 3, _INT),
    "write_sum": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT),
    "write_sums": (_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _INT, _INT, _INT),
}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for tensors of ``dtype``; None where there are none, of which a warning tells why, once."""
    if dtype not in _NAMES:
        return None
    try:
        return _compile(_NAMES[dtype])
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"spft uses plain torch on the CPU: no kernels could be compiled: {reason}", stacklevel=2)
        return None


def _compile(name: str) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc")]
    if compiler[0] is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc, or the one that CC names)")
    with tempfile.TemporaryDirectory() as folder:
        target, built = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        flags = ["-O3", "-march=native", "-fPIC", "-fopenmp", f"-D{name}"]
        _run([*compiler, *flags, "-c", str(_SOURCE), "-o", str(target)])
        # without -fopenmp: the functions of OpenMP are those that torch has loaded, with its threads
        _run([*compiler, "-shared", str(target), "-o", str(built)])
        kernels = ctypes.CDLL(str(built))
    for function, parameters in _PARAMETERS.items():
        getattr(kernels, function).argtypes = parameters
        getattr(kernels, function).restype = None
    return kernels


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
