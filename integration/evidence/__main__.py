"""Runs experiments and draws their tables.

python -m integration.evidence run                  # what is left of all experiments, the most valuable first
python -m integration.evidence run integration/evidence/experiments/gsm8k-rates.json --results build/again
python -m integration.evidence plan                 # how many runs that is, and what they cost
python -m integration.evidence report               # the page and its pictures from the recorded lines
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from integration.evidence.experiment import key_of, queue, read_experiment, runs_of
from integration.evidence.records import EXPERIMENTS, RESULTS, append, records_of, rounded

# glibc gives large blocks back at every step otherwise, and faulting them in anew takes a good part of it; the largest,
# of which a few would hold most of the heap once it is in pieces, stay apart
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(160 << 20), "MALLOC_TRIM_THRESHOLD_": str(2 << 30), "MALLOC_ARENA_MAX": "1"}


def run_files(files: list[Path], data: Path | None, bases: Path, threads: int, results: Path) -> int:
    """Every run that is not recorded yet; several processes may work on one queue.

    Returns:
        How many runs failed; the others are done all the same.
    """
    import torch

    from integration.evidence.train import train

    torch.set_num_threads(threads)
    tried: set[str] = set()
    failed = 0
    while (waiting := _waiting(files, results, tried)) is not None:
        file, run, number, total = waiting
        tried.add(key_of(run))
        with _claimed(bases / "claims", key_of(run)) as mine:
            # another process may have ended it since the queue was read
            if not mine or key_of(run) in records_of(results):
                continue
            print(f"[{number}/{total}] {file.stem}: {key_of(run)}", flush=True)
            try:
                result = train(run, data, bases)
            except Exception:
                traceback.print_exc()
                failed += 1
                continue
            line = {**run, "result": rounded(result)}
            append(results / f"{file.stem}.jsonl", line, data="hub" if data is None else "files")
            print(f"    {result}", flush=True)
    return failed


def _waiting(files: list[Path], results: Path, tried: set[str]) -> tuple[Path, dict[str, Any], int, int] | None:
    """The next run of the queue, with its number and how many there are so far: what is recorded may add runs."""
    records = records_of(results)
    for file in files:
        runs = runs_of(read_experiment(file), records)
        for number, run in enumerate(runs, 1):
            if key_of(run) not in records and key_of(run) not in tried:
                return file, run, number, len(runs)
    return None


class _claimed:
    """A lock on one run, so that no other process does it meanwhile; ``as`` says whether it was to be had."""

    def __init__(self, folder: Path, key: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / hashlib.sha256(key.encode()).hexdigest()[:24]

    def __enter__(self) -> bool:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._file.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="carry out what is not recorded yet")
    run.add_argument("files", nargs="*", type=Path, help="experiments; all that have an order by default")
    run.add_argument("--data", type=Path, help="folder with the data as JSON; the hub's data sets by default")
    run.add_argument("--bases", type=Path, default=Path("build/evidence"), help="folder for models that are made here")
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded lines")
    report = commands.add_parser("report", help="draw README.md and its pictures from the recorded lines")
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--experiments", type=Path, default=EXPERIMENTS, help="folder of the experiments")
    report.add_argument("--output", type=Path, default=Path(__file__).parent)
    left = commands.add_parser("plan", help="count what is left, and its cost by what recorded runs took")
    left.add_argument("files", nargs="*", type=Path, help="experiments; all that have an order by default")
    left.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "plan":
        from integration.evidence.plan import plan

        print(plan(arguments.files or queue(EXPERIMENTS), records_of(arguments.results)))
        return
    if arguments.command == "report":
        from integration.evidence.report import write_report

        write_report(arguments.experiments, arguments.results, arguments.output)
        return
    if _MALLOC.items() - os.environ.items():
        # read by glibc when a process starts
        sys.exit(
            subprocess.run(
                [sys.executable, "-m", "integration.evidence", *sys.argv[1:]], env=os.environ | _MALLOC
            ).returncode
        )
    files = arguments.files or queue(EXPERIMENTS)
    if failed := run_files(files, arguments.data, arguments.bases, arguments.threads, arguments.results):
        sys.exit(f"runs that failed: {failed}; their errors stand above, and the same command tries them again")


if __name__ == "__main__":
    main()
