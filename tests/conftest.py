from __future__ import annotations

import warnings

import torch

from axolotl_spft.ops.dispatch import interpreting
from tests.interpreter import pytest_pyfunc_call, repair_bfloat16  # noqa: F401

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Could not find a config file")
if interpreting():
    repair_bfloat16()
