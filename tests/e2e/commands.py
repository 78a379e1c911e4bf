"""The real axolotl command line, as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from integration.launch import warm
from integration.launch.cpu_ranks import OFFLINE


def run_axolotl(verb: str, config: Path, *arguments: str, check: bool = True, stdin: str | None = None):
    """Run one of axolotl's commands as users do; returns the completed process, output and errors in ``stdout``."""
    environment = {**os.environ, **OFFLINE}
    if verb == "train":
        command = ["accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "axolotl.cli.train"]
        done = subprocess.run(
            [sys.executable, "-m", *command, str(config), *arguments],
            env=environment,
            cwd=config.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
    else:
        command = ["axolotl.cli.main", *verb.split(), str(config), *arguments]
        done = subprocess.CompletedProcess(
            command, *warm.run(command[0], command[1:], environment, config.parent, stdin or "")
        )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
    return done
