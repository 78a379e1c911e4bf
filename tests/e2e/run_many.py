"""Runs several trainings through axolotl's command-line function in one process, to pay its imports once.

Usage: python -m tests.e2e.run_many CONFIG.yml... ; writes CONFIG.result.json beside each: {"error": null or text}.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path


def main(paths: list[str]) -> None:
    from axolotl.cli.train import do_cli

    for path in paths:
        sys.argv = [sys.argv[0]]
        error = None
        try:
            do_cli(path)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            traceback.print_exc()
        Path(path).with_suffix(".result.json").write_text(json.dumps({"error": error}))
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
