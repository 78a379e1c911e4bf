"""The folder that a merge writes to: other models in it are kept, earlier merges make room for the new one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.shards import INDEX_FILE
from axolotl_spft.errors import SpftFileError
from tests.checkpoint.saved import contents, merged_in_memory, save_adapter, save_base
from tests.models import same_weights, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    save_base(folder / "base", tiny_llama)
    save_adapter(folder / "adapter", folder / "base")
    return folder


def merged(folders, output, **options):
    return merge(folders / "adapter", output, folders / "base", **options)


def merged_of_no_base(folders, output, **options):
    """A merge that ends where it looks for its base."""
    return merge(folders / "adapter", output, "nowhere", **options)


def is_the_merge(folders, output) -> bool:
    model = AutoModelForCausalLM.from_pretrained(output)
    return same_weights(model, merged_in_memory(folders / "base", folders / "adapter"))


@pytest.mark.parametrize("name", ["model.safetensors", "model_ema.safetensors", "pytorch_model.bin"])
def test_another_model_is_not_overwritten_and_nothing_is_read_before_that_is_known(folders, tmp_path, name):
    if name.endswith(".bin"):
        (tmp_path / name).write_bytes(b"weights")
    else:
        save_file({"weight": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(SpftFileError, match=rf"no merge of this package \({name}\): name another .*`--overwrite`"):
        merged_of_no_base(folders, tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(SpftFileError, match="nowhere is neither a folder nor a model"):
        merged_of_no_base(folders, tmp_path, overwrite=True)


def test_asked_for_the_weights_of_another_model_make_room_and_files_that_no_reader_takes_stay(folders, tmp_path):
    save_base(tmp_path, tiny_gpt2, max_shard_size="10KB")
    for name in ("model_ema.safetensors", "notes.txt", "model.gguf"):
        (tmp_path / name).write_bytes(b"mine")
    for name in ("vocab.json", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_text("{}")
    merged(folders, tmp_path, overwrite=True)
    assert is_the_merge(folders, tmp_path)
    merged(folders, tmp_path / "fresh")
    others = {"model_ema.safetensors": b"mine", "notes.txt": b"mine", "model.gguf": b"mine"}
    found = {name: data for name, data in contents(tmp_path).items() if not name.startswith("fresh/")}
    assert found == contents(tmp_path / "fresh") | others


def test_an_earlier_merge_makes_room_for_another_one_and_other_files_stay(folders, tmp_path):
    other = save_base(tmp_path / "other", tiny_gpt2, max_shard_size="5GB")
    (other / "generation_config.json").write_text("{}")
    adapter = save_adapter(tmp_path / "of other", other)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "vocab.json"):
        (adapter / name).write_text(f"{{}} {name} of another model")
    output = tmp_path / "merged"
    merge(adapter, output, other)
    # as earlier versions copied it from the base
    (output / "adapter_config.json").write_text("{}")
    (output / "model.gguf").write_bytes(b"mine")
    merged(folders, output)
    assert is_the_merge(folders, output)
    merged(folders, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh") | {"model.gguf": b"mine"}
    assert not (output / "vocab.json").exists() and (output / INDEX_FILE).exists()


def test_what_lies_beside_no_weights_is_kept(folders, tmp_path):
    (tmp_path / "tokenizer.model").write_text("put here for the model to come")
    merged(folders, tmp_path)
    assert (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_an_adapter_is_refused(folders, tmp_path, overwrite):
    adapter = save_adapter(tmp_path / "other", folders / "base", 1)
    before = contents(adapter)
    with pytest.raises(SpftFileError, match=r"holds an adapter \(adapter_.*\).*name another"):
        merged_of_no_base(folders, adapter, overwrite=overwrite)
    assert contents(adapter) == before


@pytest.mark.parametrize("name", ["model-old.safetensors", "config.json", "tokenizer_config.json", INDEX_FILE])
def test_a_folder_in_the_way_is_one_clear_error(folders, tmp_path, name):
    output = tmp_path / "merged"
    merged(folders, output)
    (output / name).unlink(missing_ok=True)
    (output / name / "mine").mkdir(parents=True)
    before = contents(output)
    adapter = save_adapter(tmp_path / "other", folders / "base", 1)
    with pytest.raises(SpftFileError, match=rf"{name} is a folder.*move it"):
        merge(adapter, output, folders / "base", overwrite=True)
    now = {path: data for path, data in contents(output).items() if not path.startswith(".spft-merge/")}
    assert now == before and (output / name / "mine").is_dir()
    (output / name / "mine").rmdir()
    (output / name).rmdir()
    merge(adapter, output, folders / "base")


def test_the_config_of_an_adapter_in_the_folder_of_the_base_is_not_the_merged_models(folders, tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    (base / "adapter_config.json").write_bytes((folders / "adapter" / "adapter_config.json").read_bytes())
    merge(folders / "adapter", tmp_path / "merged", base)
    assert not (tmp_path / "merged" / "adapter_config.json").exists() and is_the_merge(folders, tmp_path / "merged")
