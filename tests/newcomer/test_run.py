"""The newcomer's path takes ten lines and the commands of the README."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml

from integration.newcomer import run
from integration.versions.matrix import ROOT


def test_the_readme_names_every_step_of_the_path():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert run.not_named(text) == []
    assert run.not_named(text.replace("axolotl spft merge config.yml", "")) == ["axolotl spft merge config.yml"]


def test_the_configuration_has_ten_lines_and_the_readmes_keys():
    text = run.CONFIG.format(base="base", bf16="false")
    assert len(text.splitlines()) == 10
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    # README's is for a GPU, where Axolotl's default of bf16 is right
    assert set(yaml.safe_load(text)) - set(block) == {"bf16"}


def test_a_step_that_fails_ends_the_path(tmp_path):
    """A stand-in for the environment whose training fails; all that comes before has run."""
    for name, status in (("python", 0), ("accelerate", 3)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexit {status}\n")
        os.chmod(tmp_path / "bin" / name, 0o755)
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, run.__file__, str(ROOT), "--python", str(tmp_path / "bin" / "python")]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    assert done.returncode == 1
    assert "`accelerate launch -m axolotl.cli.train config.yml` ended with status 3" in done.stderr
    assert "$ accelerate launch" in done.stdout and "$ axolotl" not in done.stdout
    again = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    assert again.returncode == 1 and "start in an empty folder" in again.stderr
