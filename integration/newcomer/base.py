"""A base model for those who have none at hand: the quickstart's, with fewer parameters and steps.

    python integration/newcomer/base.py FOLDER

It has learned next to nothing: it is there to run the commands, not to answer well.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from prepare import BaseSettings, build_base

if __name__ == "__main__":
    small = BaseSettings(vocab_size=512, hidden_size=64, intermediate_size=160, layers=2, heads=2, steps=20)
    build_base(Path(sys.argv[1]), small)
