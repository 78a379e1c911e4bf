from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from axolotl_spft.ops.backends.dispatch import interpreting
from tests.interpreter import DEVICE, pytest_pyfunc_call, repair_bfloat16  # noqa: F401

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Could not find a config file")
if interpreting():
    repair_bfloat16()


@pytest.fixture
def on_device() -> Iterator[None]:
    """New tensors lie on the GPU where there is one."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first, so that several workers end together."""
    items.sort(key=lambda item: (not item.get_closest_marker("engine"), not item.get_closest_marker("e2e")))
