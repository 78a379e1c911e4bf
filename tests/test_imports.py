"""Imports run one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_spft

ROOT = Path(axolotl_spft.__file__).parent
# each part may import from itself and from the parts before it
ORDER = ["errors", "files", "tables", "module_types", "card", "budget", "metrics", "reselect_rules", "peft_type",
         "config_rules", "config", "ops", "optim", "engine", "tuner", "checkpoint", "serving", "salience", "dynamic",
         "trainer", "inspection", "plugin", "bench", "planning", "tools", "__main__"]  # fmt: skip
FILES = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    own = path.parts[0].removesuffix(".py")
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("axolotl_spft.")
    }
    assert all(ORDER.index(part) <= ORDER.index(own) for part in imported), imported


def test_importing_the_package_loads_neither_torch_nor_anything_else():
    code = (
        "import sys; before = set(sys.modules); import axolotl_spft; dir(axolotl_spft)\n"
        "heavy = {'torch', 'transformers', 'peft', 'axolotl', 'bitsandbytes', 'triton', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_can_be_imported():
    assert {name for name in axolotl_spft.__all__ if getattr(axolotl_spft, name).__name__ != name} == set()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        axolotl_spft.Nothing  # noqa: B018


def test_importing_the_tuner_starts_no_cuda():
    code = "import torch, axolotl_spft.tuner; print(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
