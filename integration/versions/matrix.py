"""Runs the tests in an environment of the oldest and one of the newest releases, and records what passed.

    python -m integration.versions.matrix [--folder FOLDER] [--only NAME] [--dry-run] [--processes N] [tests/tuner ...]

``pinned`` holds what Axolotl 0.19 asks for, which is the oldest that the ranges of pyproject.toml admit beside it;
``newest`` has, against its wish, the newest releases of what Axolotl pins and still runs with. Each folder or file of
tests that is named is a run of its own, recorded when it ends in results.json, of which README.md holds the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from axolotl_spft import __version__
from axolotl_spft.files import atomic_path
from axolotl_spft.plugin.versions import TESTED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- the record -->\n", "<!-- end -->\n"
# CPU builds of torch are much smaller; any build does
TORCH = "torch==2.13.0"
WHEEL = f"axolotl_spft-{__version__}-py3-none-any.whl"
# not TRL, of which Axolotl 0.19 imports what later releases have moved; what logs runs follows the hub's client
UPGRADED = {
    "pinned": [],
    "newest": ["peft", "transformers", "accelerate", "bitsandbytes", "deepspeed", "huggingface_hub", "trackio"],
}


def test_folders() -> list[str]:
    """The folders of tests, and the files beside them: what runs by itself."""
    found = [path for path in sorted(ROOT.glob("tests/*")) if [*path.glob("**/test_*.py")] or path.match("test_*.py")]
    return [str(path.relative_to(ROOT)) for path in found]


def commands(python: Path, upgraded: list[str]) -> list[list[str]]:
    """What makes the environment of ``python``: the source distribution of the project, and the wheel out of it."""
    folder = python.parents[1]
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    made = [
        [sys.executable, "-m", "venv", str(folder)],
        [*install, "build"],
        [str(python), "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)],
        [*install, TORCH, f"{folder / 'dist' / WHEEL}[dev,deepspeed]"],
    ]
    return [*made, [*install, TORCH, "--upgrade", *upgraded]] if upgraded else made


def make_environment(python: Path, upgraded: list[str]) -> None:
    """Make the environment of ``python``, unless it is there with all that is tested."""
    if python.exists() and not set(TESTED) - set(releases(python)):
        return
    # with the source on its path pip would take the project for installed
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in commands(python, upgraded):
        subprocess.run(command, check=True, env=own)


def releases(python: Path) -> dict[str, str]:
    """package -> its release, for the packages of `TESTED` that are installed beside ``python``."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
    listed = json.loads(subprocess.run(pip, check=True, stdout=subprocess.PIPE).stdout)
    found = {package["name"]: package["version"] for package in listed}
    return {name: found[name] for name in TESTED if name in found}


def pip_check(python: Path) -> list[str]:
    """What ``pip check`` complains about."""
    check = subprocess.run([str(python), "-m", "pip", "check"], stdout=subprocess.PIPE, text=True)
    return check.stdout.strip().splitlines() if check.returncode else []


def run_tests(python: Path, tests: str, root: Path = ROOT, processes: int = 1) -> dict[str, dict[str, Any]]:
    """file -> how many of its tests passed and which did not; ``ended`` is pytest's exit status.

    A run that was killed before it could report is recorded under the name of ``tests``.
    """
    # the commands that tests start are looked up on the path
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "PYTHONPATH": str(root), "PATH": path}
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        # this family of reports names the file of each test
        options = ["-q", "--tb=short", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        if processes > 1:
            # files with fixtures that many tests share stay whole, and the long ones begin first, as in the Makefile
            options += ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
        status = subprocess.run([str(python), "-m", "pytest", *options, tests], cwd=root, env=own).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes: dict[str, dict[str, set[str]]] = {}
    for case in cases:
        tags = outcomes.setdefault(case.get("file", tests), {}).setdefault(case.get("name", ""), set())
        tags |= {child.tag for child in case}
    return {file: counts(names, status) for file, names in outcomes.items()} or {tests: counts({}, status)}


def counts(outcomes: Mapping[str, set[str]], status: int) -> dict[str, Any]:
    """The record of one file, from the marks that the report gives to each of its tests."""
    failed = sorted(name for name, tags in outcomes.items() if tags & {"failure", "error"})
    skipped = sum("skipped" in tags and name not in failed for name, tags in outcomes.items())
    date = datetime.now(timezone.utc).date().isoformat()
    return {
        "date": date, "ended": status, "passed": len(outcomes) - len(failed) - skipped, "skipped": skipped,
        "failed": failed,
    }  # fmt: skip


def folder_of(tests: str) -> str:
    """The row of the table in which a file or folder of tests counts: ``tests/tuner``, or a file beside the folders."""
    return "/".join(Path(tests).parts[:2])


def add_run(record: dict[str, Any], name: str, environment: Mapping[str, Any], tests: str, run: Mapping) -> None:
    """Put a run of ``tests`` into the record; runs with other releases than these are dropped from it."""
    before = record.get(name, {})
    runs = before["runs"] if before.get("releases") == environment["releases"] else {}
    # a file that is no longer there goes with its folder's run
    kept = {file: counted for file, counted in runs.items() if not Path(file).is_relative_to(tests)}
    folders = {folder_of(file) for file in run}
    files = before.get("files", {}) | {folder: number_of_files(folder) for folder in folders}
    record[name] = {**environment, "files": files, "runs": dict(sorted({**kept, **run}.items()))}


def number_of_files(folder: str) -> int:
    """How many files of tests a folder has; 1 for a file."""
    return len([*(ROOT / folder).glob("**/test_*.py")]) if (ROOT / folder).is_dir() else 1


def summary(runs: list[Mapping[str, Any]], files: int) -> str:
    """The cell of a folder: its runs added up, and how many of its files they are where some did not run."""
    if not runs:
        return "not run"
    passed, skipped = (sum(run[kind] for run in runs) for kind in ("passed", "skipped"))
    failed = sum(len(run["failed"]) for run in runs)
    # 0 and 1 are the ends of a run that came to its last test
    broken = sorted({str(run["ended"]) for run in runs} - {"0", "1"})
    parts = [f"{passed} passed"]
    parts += [f"{skipped} skipped"] if skipped else []
    parts += [f"**{failed} failed**"] if failed else []
    parts += [f"**broken off (status {', '.join(broken)})**"] if broken else []
    parts += [f"{len(runs)} of {files} files"] if len(runs) < files else []
    return ", ".join(parts)


def table(record: Mapping[str, Any]) -> str:
    """The record in Markdown: a column for each environment, a row for each package and folder of tests that ran."""
    names = [name for name in UPGRADED if name in record]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[package, *(record[name]["releases"][package] for name in names)] for package in TESTED]
    ran = sorted({folder_of(file) for name in names for file in record[name]["runs"]})
    for folder in ran:
        cells = []
        for name in names:
            runs = [run for file, run in record[name]["runs"].items() if folder_of(file) == folder]
            cells.append(summary(runs, record[name]["files"].get(folder, 0)))
        rows.append([f"`{folder}`", *cells])
    if set(test_folders()) - set(ran):
        rows.append(["all other tests", *("not run" for _ in names)])
    rows.append(["`pip check`", *("; ".join(record[name]["pip_check"]) or "no complaint" for name in names)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_page(record: Mapping[str, Any]) -> None:
    """Put the table between the marks of README.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    with atomic_path(PAGE) as path:
        path.write_text(before + BEGIN + table(record) + END + rest.split(END)[1], encoding="utf-8")


def measure(name: str, python: Path, tests: list[str], processes: int) -> bool:
    """Make an environment, run the named tests in it one by one and record each; whether all passed."""
    make_environment(python, UPGRADED[name])
    environment = {"releases": releases(python), "pip_check": pip_check(python)}
    well = True
    for each in tqdm(tests, desc=name, unit="folder"):
        run = run_tests(python, each, processes=processes)
        record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        add_run(record, name, environment, each, run)
        with atomic_path(RESULTS) as path:
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_page(record)
        well &= all(counted["ended"] == 0 for counted in run.values())
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="keep the environments here (FOLDER/pinned, FOLDER/newest), and use what is there"
    )
    parser.add_argument("--only", choices=UPGRADED, help="one of the environments")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument("--processes", type=int, default=1, help="tests run in so many processes side by side (1)")
    parser.add_argument("tests", nargs="*", help="folders or files of tests (all)")
    options = parser.parse_args()
    folders = options.tests or test_folders()
    if missing := [folder for folder in folders if not (ROOT / folder).exists()]:
        parser.error(f"{missing[0]} is not there: name folders or files from {ROOT}, such as tests/tuner")
    well = True
    with tempfile.TemporaryDirectory() as own:
        for name in [options.only] if options.only else UPGRADED:
            python = (options.folder or Path(own)).absolute() / name / "bin" / "python"
            if options.dry_run:
                made = [] if python.exists() else commands(python, UPGRADED[name])
                tests = [[str(python), "-m", "pytest", "-q", folder] for folder in folders]
                print(*map(shlex.join, [*made, *tests]), sep="\n")
            else:
                well &= measure(name, python, folders, options.processes)
    if not well:
        raise SystemExit("not every test passed")


if __name__ == "__main__":
    main()
