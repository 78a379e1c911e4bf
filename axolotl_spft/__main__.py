"""``python -m axolotl_spft <command>``: the same as ``axolotl spft <command>``."""

from __future__ import annotations

from axolotl_spft.tools.cli import spft

if __name__ == "__main__":
    spft(prog_name="python -m axolotl_spft")
