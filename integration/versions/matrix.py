"""Runs the tests in an environment of the oldest and one of the newest releases, and records what passed.

    python -m integration.versions.matrix [--folder FOLDER] [--only NAME] [tests ...]

``pinned`` holds what Axolotl 0.19 asks for, which is the oldest that the ranges of pyproject.toml admit beside it;
``newest`` has the newest releases of everything that Axolotl pins, against its wish. The record is results.json, and
README.md holds its table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from axolotl_spft.plugin.versions import TESTED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- the record -->\n", "<!-- end -->\n"
# CPU builds of torch are much smaller; any build does
TORCH = "torch==2.13.0"
UPGRADED = {"pinned": [], "newest": ["peft", "transformers", "accelerate", "trl", "bitsandbytes", "deepspeed"]}


def make_environment(python: Path, upgraded: list[str]) -> dict[str, Any]:
    """Install the project, from its wheel; returns the installed releases and what ``pip check`` says."""
    folder = python.parents[1]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "build"], check=True)
    # the source distribution, and the wheel out of it
    subprocess.run([str(python), "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", TORCH, f"{wheel}[dev,deepspeed]"], check=True)
    if upgraded:
        subprocess.run([*pip, "install", "--quiet", TORCH, "--upgrade", *upgraded], check=True)
    listed = json.loads(subprocess.run([*pip, "list", "--format", "json"], check=True, stdout=subprocess.PIPE).stdout)
    releases = {package["name"]: package["version"] for package in listed}
    check = subprocess.run([*pip, "check"], stdout=subprocess.PIPE, text=True).stdout.strip()
    return {"releases": {name: releases[name] for name in TESTED}, "pip_check": check.splitlines()}


def run_tests(python: Path, tests: list[str]) -> dict[str, Any]:
    """How many tests passed, and which did not."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        subprocess.run([str(python), "-m", "pytest", "-q", f"--junitxml={report.name}", *tests], cwd=ROOT)
        cases = list(ElementTree.parse(report.name).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": {child.tag for child in case} for case in cases}
    failed = sorted(name for name, tags in outcomes.items() if tags & {"failure", "error"})
    skipped = sum("skipped" in tags for tags in outcomes.values())
    return {"passed": len(outcomes) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: one column for each environment."""
    names = list(record)
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[package, *(record[name]["releases"][package] for name in names)] for package in TESTED]
    rows.append(["tests", *(" ".join(record[name]["tests"]) or "all" for name in names)])
    rows += [[kind, *(str(record[name][kind]) for name in names)] for kind in ("passed", "skipped")]
    rows.append(["failed", *(str(len(record[name]["failed"])) for name in names)])
    rows.append(["`pip check`", *("; ".join(record[name]["pip_check"]) for name in names)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_page(record: dict[str, Any]) -> None:
    """Put the table between the marks of README.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(record) + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the environments here, and use those that are there")
    parser.add_argument("--only", choices=UPGRADED, help="one of the environments")
    parser.add_argument("tests", nargs="*", help="files or folders (all)")
    options = parser.parse_args()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as own:
        for name in tqdm([options.only] if options.only else list(UPGRADED), desc="Environments"):
            python = (options.folder or Path(own)).resolve() / name / "bin" / "python"
            environment = make_environment(python, UPGRADED[name])
            date = datetime.now(timezone.utc).date().isoformat()
            record[name] = {"date": date, **environment, "tests": options.tests, **run_tests(python, options.tests)}
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")
            write_page(record)
    if any(each["failed"] for each in record.values()):
        raise SystemExit("not every test passed")


if __name__ == "__main__":
    main()
