"""What the heads of the examples say about memory is what `plan` says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from axolotl_spft.planning.estimate import GIB, estimate
from axolotl_spft.planning.settings import Settings, read_settings
from axolotl_spft.planning.shapes import ModelShape, find_config, read_shape

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in ROOT.glob("examples/**/*.yml") if "GiB in training" in path.read_text())


SHAPES: dict[tuple[str, str], ModelShape] = {}


def _shape(run: Settings) -> ModelShape:
    key = (run.base_model, str({**run.options, "salience": None}))
    if key not in SHAPES:
        SHAPES[key] = read_shape(find_config(run.base_model, None)[0], run.options)
    return SHAPES[key]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_head_says_what_plan_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    gib, training, salience = map(
        int,
        re.search(r"Memory per GPU of (\d+) GiB: (\d+) GiB in training, (\d+) GiB in the salience pass", head).groups(),
    )
    words = shlex.split(re.search(r"`axolotl spft (plan [^`]+)`", head)[1])
    assert words[1] == str(path.relative_to(ROOT))
    options = dict(zip(words[2::2], words[3::2]))
    assert gib == int(options.get("--gpu-memory", 80))
    run = read_settings(Path(words[1]), int(options["--gpus"]) if "--gpus" in options else None)
    found = estimate(_shape(run), run, gib * GIB)
    assert (training, salience) == (round(found.peak / GIB), round(found.salience_peak / GIB))
