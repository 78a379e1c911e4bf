"""The page about tested releases holds the record, and the record holds what the plugin calls tested."""

from __future__ import annotations

import json
import shutil

import pytest

from axolotl_spft.plugin.versions import TESTED
from integration.versions import matrix


def record_of(failed: list[str]) -> dict:
    """A record of both environments, with the releases that the plugin calls tested."""
    return {
        name: {
            "date": "2026-01-02", "releases": {package: tested[which] for package, tested in TESTED.items()},
            "pip_check": ["No broken requirements found."], "tests": [], "passed": 7, "skipped": 1, "failed": failed,
        }
        for which, name in enumerate(matrix.UPGRADED)
    }  # fmt: skip


def test_the_page_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    shutil.copy(matrix.PAGE, page)
    monkeypatch.setattr(matrix, "PAGE", page)
    matrix.write_page(record_of(["tests.a::b"]))
    first = page.read_text()
    assert "| peft | 0.20.0 | 0.21.2 |" in first
    assert "| failed | 1 | 1 |" in first
    matrix.write_page(record_of([]))
    assert page.read_text() == first.replace("| failed | 1 | 1 |", "| failed | 0 | 0 |")


@pytest.mark.skipif(not matrix.RESULTS.exists(), reason="no record yet: python -m integration.versions.matrix")
def test_the_page_holds_the_record():
    record = json.loads(matrix.RESULTS.read_text())
    assert matrix.table(record) in matrix.PAGE.read_text()
    for which, name in enumerate(matrix.UPGRADED):
        found = {package: release.partition("+")[0] for package, release in record[name]["releases"].items()}
        assert found == {package: tested[which] for package, tested in TESTED.items()}
