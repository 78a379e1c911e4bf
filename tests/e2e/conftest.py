from __future__ import annotations

import pytest

from integration.engines.workspace import make_workspace, write_config
from tests.e2e.commands import run_axolotl


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def trained(workspace):
    """Six steps through `accelerate launch -m axolotl.cli.train`, with checkpoints at 3 and 6."""
    config = write_config(workspace, "trained", spft={"density": 0.05, "samples": 8, "mask_path": "mask.safetensors"})
    log = run_axolotl("train", config).stdout
    return workspace / "trained", log


@pytest.fixture(scope="session")
def mask_alone(workspace):
    """The mask file that `axolotl spft mask` makes for the configuration of ``trained``, and what it printed."""
    config = write_config(workspace, "mask_alone", output_dir=str(workspace / "never_made"))
    output = workspace / "mask_alone.safetensors"
    return output, run_axolotl("spft mask", config, "-o", str(output)).stdout
