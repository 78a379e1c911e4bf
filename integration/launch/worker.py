"""One CPU rank: ``axolotl.cli.train`` with the patches that CPU ranks need. Started by `integration.launch.cpu_ranks`."""

from __future__ import annotations

import sys

from integration.launch import crash
from integration.launch.patches import apply_all


def main() -> None:
    apply_all()
    crash.arm()
    from axolotl.cli.train import do_cli

    do_cli(config=sys.argv[1])


if __name__ == "__main__":
    main()
