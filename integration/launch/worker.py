"""One CPU rank: ``axolotl.cli.train`` with the patches that CPU ranks need. Started by `integration.launch.cpu_ranks`.

An argument ``<config>=<mask>`` runs `axolotl spft mask` instead. With several configurations it trains them
one after the other, to pay the imports once, and writes for each ``<name>.result.json``: {"error": null or text}.
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
    tasks = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    # axolotl reads command-line options of its own
    sys.argv = sys.argv[:1]
    patches.apply_all()
    crash.arm()

    if len(tasks) == 1:
        _do(*tasks[0])
        return
    patches.keep_process_group()
    for config, mask in tasks:
        patches.forget_run()
        error = None
        try:
            _do(config, mask)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":
            Path(config).with_suffix(".result.json").write_text(json.dumps({"error": error}))
        gc.collect()


def _do(config: str, mask: str) -> None:
    if mask:
        from axolotl_spft.plugin.mask_run import compute_mask

        compute_mask(Path(config), Path(mask))
    else:
        from axolotl.cli.train import do_cli

        do_cli(config=config)


if __name__ == "__main__":
    main()
