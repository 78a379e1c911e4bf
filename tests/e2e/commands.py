"""The real axolotl command line, as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from integration.launch.cpu_ranks import OFFLINE


def run_axolotl(verb: str, config: Path, *arguments: str, check: bool = True, stdin: str | None = None):
    """Run one of axolotl's commands as users do; returns the completed process, output and errors in ``stdout``."""
    if verb == "train":
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
        command += ["-m", "axolotl.cli.train", str(config), *arguments]
    else:
        command = [sys.executable, "-m", "axolotl.cli.main", *verb.split(), str(config), *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, **OFFLINE},
        cwd=config.parent,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
    return done
