"""The page about tested releases holds the record, and the record holds what ran, and no more."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from axolotl_spft.plugin.versions import TESTED
from integration.versions import matrix

PASSED = {"date": "2026-01-02", "ended": 0, "passed": 7, "skipped": 1, "failed": []}


def environment_of(which: int) -> dict:
    """The releases that the plugin calls tested: the oldest (0) or the newest (1)."""
    return {"releases": {package: tested[which] for package, tested in TESTED.items()}, "pip_check": []}


def test_the_page_is_written_between_its_marks_and_shows_what_did_not_run(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    shutil.copy(matrix.PAGE, page)
    monkeypatch.setattr(matrix, "PAGE", page)
    record = {}
    versions = "tests/versions/test_matrix.py"
    failed = {**PASSED, "ended": 1, "failed": ["a"]}
    matrix.add_run(record, "newest", environment_of(1), "tests/versions", {versions: failed})
    matrix.write_page(record)
    assert "| peft | 0.21.2 |\n" in page.read_text()
    assert "| `tests/versions` | 7 passed, 1 skipped, **1 failed** |\n" in page.read_text()
    matrix.add_run(record, "pinned", environment_of(0), versions, {versions: PASSED})
    killed = {"tests/optim": {**PASSED, "ended": -9, "passed": 0, "skipped": 0}}
    matrix.add_run(record, "newest", environment_of(1), "tests/optim", killed)
    two = {f"tests/tuner/test_{name}.py": PASSED for name in ("layer", "model")}
    matrix.add_run(record, "newest", environment_of(1), "tests/tuner", two)
    matrix.write_page(record)
    text = page.read_text()
    assert "| peft | 0.20.0 | 0.21.2 |\n" in text
    assert "| `tests/versions` | 7 passed, 1 skipped | 7 passed, 1 skipped, **1 failed** |\n" in text
    assert "| `tests/optim` | not run | 0 passed, **broken off (status -9)**, 1 of " in text
    files = matrix.number_of_files("tests/tuner")
    assert f"| `tests/tuner` | not run | 14 passed, 2 skipped, 2 of {files} files |" in text
    table = text.partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert "| all other tests | not run | not run |\n" in table and "tests/engine" not in table
    assert text.partition(matrix.BEGIN)[0] == matrix.PAGE.read_text().partition(matrix.BEGIN)[0]


def test_later_runs_replace_earlier_ones_and_other_releases_leave_the_record():
    record = {}
    old = dict.fromkeys(("tests/tuner/test_layer.py", "tests/tuner/test_gone.py"), PASSED)
    matrix.add_run(record, "newest", environment_of(1), "tests/tuner", old)
    matrix.add_run(record, "newest", environment_of(1), "tests/test_card.py", {"tests/test_card.py": PASSED})
    better = {"tests/tuner/test_layer.py": {**PASSED, "passed": 8}}
    matrix.add_run(record, "newest", environment_of(1), "tests/tuner/test_layer.py", better)
    passed = {file: run["passed"] for file, run in record["newest"]["runs"].items()}
    assert passed == {"tests/test_card.py": 7, "tests/tuner/test_gone.py": 7, "tests/tuner/test_layer.py": 8}
    matrix.add_run(record, "newest", environment_of(1), "tests/tuner", better)
    assert set(record["newest"]["runs"]) == {"tests/test_card.py", "tests/tuner/test_layer.py"}
    matrix.add_run(record, "newest", environment_of(0), "tests/optim", {"tests/optim": PASSED})
    assert set(record["newest"]["runs"]) == {"tests/optim"}


def test_a_run_counts_by_file_what_passed_and_names_what_did_not(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_good(n): pass\n"
        "def test_bad(): assert False\n"
        "def test_error(broken): pass\n"
        "def test_skipped(): pytest.skip()\n"
    )
    (tmp_path / "tests" / "test_more.py").write_text(
        "import os, sys\n"
        "def test_the_environments_commands_come_first(): "
        "assert os.environ['PATH'].split(os.pathsep)[0] == os.path.dirname(sys.executable)\n"
    )
    runs = matrix.run_tests(Path(sys.executable), "tests", tmp_path)
    assert set(runs) == {"tests/test_some.py", "tests/test_more.py"}
    run = runs["tests/test_some.py"]
    assert (run["ended"], run["passed"], run["skipped"]) == (1, 2, 1)
    assert run["failed"] == ["test_bad", "test_error"]
    assert (runs["tests/test_more.py"]["passed"], runs["tests/test_more.py"]["failed"]) == (1, [])
    assert matrix.run_tests(Path(sys.executable), "tests", tmp_path, processes=2) == runs
    nothing = matrix.run_tests(Path(sys.executable), "test_missing.py", tmp_path)["test_missing.py"]
    assert nothing["ended"] not in (0, 1)
    assert (nothing["passed"], nothing["failed"]) == (0, [])


def test_an_environment_that_is_there_is_used(tmp_path, monkeypatch):
    """A stand-in for its python answers ``pip list``, and would be the one to install."""
    python = tmp_path / "newest" / "bin" / "python"
    python.parent.mkdir(parents=True)
    listed = [{"name": name, "version": newest} for name, (_, newest) in TESTED.items()]
    python.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\necho '{json.dumps(listed)}'\n")
    os.chmod(python, 0o755)
    matrix.make_environment(python, matrix.UPGRADED["newest"])
    assert "install" not in (tmp_path / "called").read_text()
    # one that was left half made is made
    python.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\necho '{json.dumps(listed[:-1])}'\n")
    monkeypatch.setattr(matrix, "commands", lambda *_: [["sh", "-c", f"echo made >> {tmp_path}/called"]])
    matrix.make_environment(python, matrix.UPGRADED["newest"])
    assert (tmp_path / "called").read_text().endswith("made\n")


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, monkeypatch, capsys):
    arguments = ["matrix", "--folder", str(tmp_path / "never"), "--only", "newest", "--dry-run", "tests/optim"]
    monkeypatch.setattr(sys, "argv", arguments)
    matrix.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"-m venv {tmp_path}/never/newest")
    assert "--upgrade peft transformers" in lines[-2]
    assert lines[-1] == f"{tmp_path}/never/newest/bin/python -m pytest -q tests/optim"
    assert not (tmp_path / "never").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "tests/nowhere"])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == 2
    assert "tests/nowhere is not there" in capsys.readouterr().err


@pytest.mark.skipif(not matrix.RESULTS.exists(), reason="no record yet: python -m integration.versions.matrix")
def test_the_page_holds_the_record():
    record = json.loads(matrix.RESULTS.read_text())
    assert matrix.table(record) in matrix.PAGE.read_text()
    for which, name in enumerate(matrix.UPGRADED):
        if name in record:
            found = {package: release.partition("+")[0] for package, release in record[name]["releases"].items()}
            assert found == {package: tested[which] for package, tested in TESTED.items()}
