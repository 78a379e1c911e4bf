"""Runs PEFT's own tests with `SpftConfig` beside `ShiraConfig`, from a checkout of PEFT.

python -m integration.peft_suite.run --peft FOLDER [--parts custom decoders ...] [--methods SPFT SHiRA]

The checkout must be of the release of PEFT that is installed. Its code stays where it is; the counts are written to
results.json, and the page README.md is made from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl_spft.files import atomic_path
from integration.peft_suite.page import PAGE, RESULTS, page, table
from integration.peft_suite.plugin import METHODS
from integration.peft_suite.stand_ins import write_models

PARTS = {
    "custom": "test_custom_models.py",
    "decoders": "test_decoder_models.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "features": "test_feature_extraction_models.py",
    "classification": "test_seq_classifier.py",
    "quantization": "test_quantization.py",
}
_ROOT = Path(__file__).parents[2]


def run_part(peft: Path, file: str, hub: Path, methods: list[str], timeout_s: float) -> dict[str, dict[str, str]]:
    """The record of each test of a file: method, outcome, and what it said when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "SPFT_SUITE_RECORD": str(record),
            "SPFT_SUITE_METHODS": ",".join(methods),
        }
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-p", "integration.peft_suite.plugin",
                   "-p", "no:cacheprovider", "-o", "addopts=", "--tb=no", "-W", "ignore"]  # fmt: skip
        process = subprocess.Popen(command, cwd=peft, env=environment)
        try:
            if process.wait(timeout_s) not in (0, 1):
                raise SystemExit(f"pytest could not run {peft / 'tests' / file}: see above")
        except subprocess.TimeoutExpired:
            # pytest ends by itself, and its plugin writes what was run
            process.send_signal(2)
            process.wait()
        return json.loads(record.read_text(encoding="utf-8"))


def counts_of(records: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """For each method how many tests passed, failed, were skipped or not run, and which failed and why."""
    found: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        counts = found.setdefault(record["method"], {"passed": 0, "failed": 0, "skipped": 0, "not run": 0, "said": {}})
        counts[record.get("outcome", "not run")] += 1
        if record.get("outcome") == "failed":
            counts["said"][name.partition("::")[2]] = record["said"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", type=Path, required=True, help="a checkout of PEFT, of the release installed here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="of one part")
    parser.add_argument("--hub", type=Path, help="folder for the stand-ins of the models; a temporary one by default")
    options = parser.parse_args()
    if not (options.peft / "tests" / "testing_common.py").is_file():
        raise SystemExit(f"--peft {options.peft} holds no tests of PEFT: name a checkout of its repository")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        hub = options.hub or Path(folder)
        write_models(hub)
        for part in options.parts:
            records = run_part(options.peft, PARTS[part], hub, options.methods, options.timeout)
            results[part] = {**results.get(part, {}), **counts_of(records), "peft": version("peft")}
            with atomic_path(RESULTS) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            with atomic_path(PAGE) as temporary:
                temporary.write_text(page(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
