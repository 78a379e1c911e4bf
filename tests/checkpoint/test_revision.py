"""An adapter is merged onto the commit of its base that it was trained on."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.trained_base import recorded_base
from axolotl_spft.errors import SpftFileError
from axolotl_spft.plugin.streamed_merge import merge_arguments
from axolotl_spft.tools.cli import spft
from tests.checkpoint.saved import contents, make_older, save_base
from tests.hub import fill_cache, move_branch
from tests.models import tiny_llama, with_adapter

NAME = "of/us"


@pytest.fixture
def commits(tmp_path, monkeypatch):
    """branch -> commit of a base on the hub, and the folder of each under the branch's name."""
    for scale, branch in enumerate(("main", "v2"), 1):
        # a power of 2 is exact
        save_base(tmp_path / branch, lambda dtype, scale=scale: _scaled(tiny_llama(dtype), scale))
    return fill_cache(tmp_path / "hub", NAME, {name: tmp_path / name for name in ("main", "v2")}, monkeypatch)


def _scaled(model, factor):
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    return model


def _run_on(tmp_path, revision, **options):
    base = AutoModelForCausalLM.from_pretrained(NAME, revision=revision)
    with_adapter(base, revision=revision, **options).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def _merge(tmp_path, source, *arguments):
    """What `axolotl spft merge` answers."""
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    command = ["merge", str(source), "--output", str(tmp_path / "merged"), *arguments]
    return CliRunner().invoke(spft, command)


def _onto(tmp_path, branch) -> bool:
    """Whether the last merge was onto a branch's folder."""
    merge(tmp_path / "run", tmp_path / "expected", tmp_path / branch, overwrite=True)
    weights = [{name: data for name, data in contents(tmp_path / folder).items() if name.endswith(".safetensors")}
               for folder in ("merged", "expected")]  # fmt: skip
    return weights[0] == weights[1]


@pytest.mark.parametrize("revision", [None, "v2"])
@pytest.mark.parametrize("kind", ["adapter", "configuration", "older"])
def test_what_an_adapter_records_is_taken_where_nothing_else_is_told(tmp_path, commits, revision, kind):
    run = source = _run_on(tmp_path, revision)
    assert recorded_base(run)["commit"] == commits[revision or "main"]
    if kind == "configuration":
        source = tmp_path / "config.yml"
        source.write_text(json.dumps({"adapter": "spft", "base_model": NAME, "output_dir": str(run)}))
    if kind == "older":
        # whose config alone says the branch
        make_older(run)
    else:
        # the author goes on
        move_branch(tmp_path / "hub", NAME, revision or "main", commits["main" if revision else "v2"])
    result = _merge(tmp_path, source)
    assert result.exit_code == 0 and _onto(tmp_path, revision or "main"), result.output
    assert "records the commit" not in result.output


def test_another_commit_has_to_be_asked_for_and_is_told(tmp_path, commits):
    run = _run_on(tmp_path, "v2")
    said = f"records the commit {commits['v2']} of its base; this is merged onto {commits['main']}"
    result = _merge(tmp_path, run, "--revision", "main")
    assert result.exit_code == 0 and said in result.output and _onto(tmp_path, "main"), result.output
    shutil.rmtree(tmp_path / "hub/models--of--us/snapshots" / commits["v2"])
    result = _merge(tmp_path, run)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.output
    for said in (f"{commits['v2']} of {NAME}, which cannot be had", "`--revision` (another branch than v2"):
        assert said in result.stderr
    assert _merge(tmp_path, run, "--revision", commits["main"]).exit_code == 0
    # another base has other commits
    result = _merge(tmp_path, run, "--base", str(tmp_path / "main"))
    assert result.exit_code == 0 and "records the commit" not in result.output


def test_the_branch_that_the_adapter_names_too_says_no_more_than_its_commit(tmp_path, commits):
    run = _run_on(tmp_path, "v2")
    move_branch(tmp_path / "hub", NAME, "v2", commits["main"])
    cfg = {"adapter": "spft", "base_model": NAME, "output_dir": str(run)}
    for told, branch in (("v2", "v2"), ("main", "main"), (commits["main"], "main")):
        report = merge(
            **merge_arguments(cfg | {"model_revision": told}, "config.yml") | {"output": tmp_path / "to" / told}
        )
        assert report["base"]["commit"] == commits[branch] and report["base"]["trained_commit"] == commits["v2"]


def test_a_base_in_a_folder_has_no_commit(tmp_path):
    base = save_base(tmp_path / "main", tiny_llama)
    with_adapter(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "run")
    assert "commit" not in recorded_base(tmp_path / "run")
    report = merge(tmp_path / "run", tmp_path / "merged", revision="v2")
    assert report["base"] == {"folder": str(base), "commit": None, "trained_commit": None}


def test_a_damaged_record_of_a_commit_is_an_error(tmp_path, commits, monkeypatch):
    monkeypatch.setattr("axolotl_spft.tuner.load.trained_on", lambda *_: {"dtype": "float32", "commit": 3})
    with pytest.raises(SpftFileError, match=r"record .* is damaged"):
        recorded_base(_run_on(tmp_path, None))
