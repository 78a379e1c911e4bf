"""Releases that nobody tested are named, and nothing is refused."""

from __future__ import annotations

import logging

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_spft import SpftPlugin
from axolotl_spft.plugin import versions
from axolotl_spft.plugin.versions import TESTED, installed, untested


@pytest.mark.parametrize("which", [0, 1])
def test_tested_releases_are_not_named(which):
    assert untested({name: tested[which] for name, tested in TESTED.items()}) is None


@pytest.mark.parametrize(
    ("name", "release", "named"),
    [
        ("peft", "0.21.99", None),
        ("torch", "2.13.0+cpu", None),
        ("axolotl", "0.19.0.post1", None),
        ("axolotl", "0.20.0.dev0", "axolotl 0.20.0.dev0 (tested: 0.19.0)"),
        ("axolotl", "0.21.0", "axolotl 0.21.0 (tested: 0.19.0)"),
        ("peft", "0.19.1", "peft 0.19.1 (tested: 0.20.0 to 0.21.2)"),
        ("transformers", "6.0.0rc1", "transformers 6.0.0rc1 (tested: 5.16.1 to 5.24.0)"),
    ],
)
def test_another_release_is_named_by_its_first_two_numbers(name, release, named):
    said = untested({name: release})
    assert (said is None) == (named is None)
    assert named is None or named in said


def test_a_run_says_it_in_one_line_and_goes_on(monkeypatch, caplog):
    assert installed().keys() <= TESTED.keys()
    monkeypatch.setattr(versions, "version", {**installed(), "axolotl": "0.21.0", "peft": "0.30.1"}.__getitem__)
    with caplog.at_level(logging.WARNING):
        SpftPlugin().pre_model_load(DictDefault({"adapter": "lora"}))
        assert caplog.records == []
        SpftPlugin().pre_model_load(DictDefault({"adapter": "spft"}))
    (record,) = caplog.records
    for part in ("axolotl 0.21.0", "peft 0.30.1"):
        assert part in record.getMessage()
