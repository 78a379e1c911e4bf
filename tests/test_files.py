"""Atomic writes and the check of a file's header."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import atomic_path, check_safetensors, write_json


def test_the_file_appears_complete_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_safetensors(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.arange(10)}, path)
    check_safetensors(path)
    whole = path.read_bytes()
    for broken in (b"", b"garbage!", whole[:5], whole[:20], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(SpftFileError, match=f"{path}: not a complete safetensors file"):
            check_safetensors(path)
    with pytest.raises(SpftFileError):
        check_safetensors(tmp_path / "absent")


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
