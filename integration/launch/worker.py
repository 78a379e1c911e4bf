"""One CPU rank: ``axolotl.cli.train`` with the patches that CPU ranks need. Started by `integration.launch.cpu_ranks`.

With several configurations it trains them one after the other, to pay the imports once, and writes for each
``<name>.result.json``: {"error": null or text}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path

from integration.launch import crash, patches


def main() -> None:
    configs = sys.argv[1:]
    # axolotl reads command-line options of its own
    sys.argv = sys.argv[:1]
    patches.apply_all()
    crash.arm()
    from axolotl.cli.train import do_cli

    if len(configs) == 1:
        do_cli(config=configs[0])
        return
    patches.keep_process_group()
    for config in configs:
        patches.forget_run()
        error = None
        try:
            do_cli(config=config)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":
            Path(config).with_suffix(".result.json").write_text(json.dumps({"error": error}))
        gc.collect()


if __name__ == "__main__":
    main()
