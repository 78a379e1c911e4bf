"""The page README.md of this folder, from results.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("README.md")

_HEAD = """# PEFT's own tests

`python -m integration.peft_suite.run --peft FOLDER` runs the tests of a checkout of PEFT that are parametrized with `ShiraConfig`, the method of PEFT
nearest to this one, with `SpftConfig` as well. The checkout is yours to make, of the release that is installed; none of its code is here. Where
the tests load a model, a small random one of the same architecture stands in for it, so nothing is downloaded.

Each case of SHiRA has one of ours with the same modules, or all linear ones where it names none, and as many values as a LoRA of its rank. Ours has
a random mask and random values: a new sparse adapter has no mask, and trains nothing before it has one. Batches whose rows have several adapters,
which SHiRA has not, and quantized bases, on which PEFT tests other methods, have cases of their own.

`--parts PART --methods SPFT` makes one number of the table.

"""  # noqa: E501

_FOOT = """
Why they fail:

- `test_from_pretrained_config_construction` asks for `peft_config["default"] is config`: one `SpftConfig` may serve several models, so each keeps its records in a copy.
- `test_disable_adapters` (custom): the tests want a new adapter that changes nothing until it is trained, and ours begins with random values there.
- Where it has no mask: the test trains, or runs in train mode, an adapter that it makes without `init_weights=False`.
- `test_training` and its relative, of features: without targets ours takes all linear layers, the pooler among them, whose output these tests do not read.
- `test_mixed_adapter_batches_mlp` wants each row to 1e-5 of every value, also of those near 0. W of all rows is multiplied once and S added beside it,
  which rounds otherwise than W + S: in float64 the rows of its model (of seed 0) are equal to the bit, and in float32 they are 8e-6 off those, where W + S is
  12e-6 off. `tests/tuner/test_mixed_batch.py` holds the rows to 1e-5 of the largest value, and in float64 to 1e-12.
"""  # noqa: E501


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{_HEAD}{table(results)}{_failures(results)}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """How many tests of each part passed of those that were run, by method."""
    lines = ["| part | PEFT | SPFT passed | SHiRA passed | skipped by PEFT (SPFT, SHiRA) |", "|---|---|---|---|---|"]
    for part, found in results.items():
        ours, theirs = found.get("SPFT"), found.get("SHiRA")
        skipped = ", ".join(str(counts["skipped"]) if counts else "-" for counts in (ours, theirs))
        lines.append(f"| {part} | {found['peft']} | {_passed(ours)} | {_passed(theirs)} | {skipped} |")
    return "\n".join(lines) + "\n"


def _passed(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return "not run"
    late = f" ({counts['not run']} not run: out of time)" if counts["not run"] else ""
    return f"{counts['passed']} of {counts['passed'] + counts['failed']}{late}"


def _failures(results: Mapping[str, Mapping[str, Any]]) -> str:
    said = Counter(
        (name.partition("[")[0].rpartition("::")[2], text)
        for found in results.values()
        for name, text in found.get("SPFT", {}).get("said", {}).items()
    )
    if not said:
        return ""
    lines = ["", "What failed with SPFT:", "", "| times | test | it said |", "|---|---|---|"]
    for (test, text), count in sorted(said.items(), key=lambda each: (-each[1], each)):
        lines.append(f"| {count} | `{test}` | {_cell(text)} |")
    return "\n".join(lines) + "\n" + _FOOT


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
