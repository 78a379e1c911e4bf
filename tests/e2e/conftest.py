from __future__ import annotations

import pytest

from tests.e2e.workspace import make_workspace, run_axolotl, write_config


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def trained(workspace):
    """Six steps through `accelerate launch -m axolotl.cli.train`, with checkpoints at 3 and 6."""
    config = write_config(workspace, "trained", spft={"density": 0.05, "samples": 8, "mask_path": "mask.safetensors"})
    log = run_axolotl("train", config).stdout
    return workspace / "trained", log
