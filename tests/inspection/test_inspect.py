"""Files of real models, from reading to tables and JSON."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.tools.cli import spft
from tests.models import tiny_gpt2, tiny_llama, token_batch, with_adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Llama's and a GPT-2's masks, and adapters with random values; the bases beside them."""
    folder = tmp_path_factory.mktemp("files")
    for name, make in (("llama", tiny_llama), ("gpt2", tiny_gpt2)):
        base = make()
        base.save_pretrained(folder / f"{name}_base")
        for scope in ("layer", "global"):
            path = folder / f"{name}_{scope}.safetensors"
            config = SpftConfig(density=0.1, target_modules="all-linear", scope=scope, mask_path=str(path))
            select_mask(get_peft_model(make(), config), [token_batch()])
        with_adapter(base, target_modules="all-linear").save_pretrained(folder / name)
    return folder


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(spft, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_beside_its_base_equals_the_model(files, name):
    told = json.loads(run(files / name, "--base", files / f"{name}_base", "--json"))["files"][0]
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[name]
    weights, model = make().state_dict(), with_adapter(make(), target_modules="all-linear")
    merged = model.merge_and_unload().state_dict()
    squares, changed = [0.0, 0.0], {}
    for module in told["matrices"]:
        before = weights[f"{module}.weight"].double()
        delta = merged[f"{module}.weight"].double() - before
        squares = [squares[0] + delta.square().sum(), squares[1] + before.square().sum()]
        changed[module] = (delta / before).abs().max().item()
    assert told["total"]["values"]["relative_norm"] == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)
    for module, largest in changed.items():
        assert told["matrices"][module]["values"]["largest_change"] == pytest.approx(largest, rel=1e-3)
    saved = load_file(files / name / "adapter_model.safetensors")
    values = torch.cat([tensor for key, tensor in saved.items() if key.endswith("spft_values")]).abs()
    assert told["total"]["selected"] == values.numel()
    assert told["total"]["values"]["quantiles"]["0.5"] == pytest.approx(values.quantile(0.5).item(), rel=1e-6)
    assert set(told["module_types"]) >= ({"q_proj"} if name == "llama" else {"attn.c_proj", "mlp.c_proj"})


def test_an_embedding_and_a_head_that_have_grown_are_measured_as_a_merge_takes_them(files, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(files / "llama_base")
    model.resize_token_embeddings(70)
    model = with_adapter(model, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model.save_pretrained(tmp_path / "grown")
    told = json.loads(run(tmp_path / "grown", "--base", files / "llama_base", "--json"))["files"][0]
    for module in ("model.embed_tokens", "lm_head"):
        layer = model.base_model.model.get_submodule(module)
        weight, delta = layer.get_base_weight().double(), layer.get_delta_weight("default").double()
        assert told["matrices"][module]["out_features"] == 70
        figures = told["matrices"][module]["values"]
        assert figures["relative_norm"] == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)
        assert figures["largest_change"] == pytest.approx((delta / weight).abs().max().item(), rel=1e-4)
    result = CliRunner().invoke(spft, ["merge", str(tmp_path / "grown"), "--base", str(files / "llama_base"),
                                       "--output", str(tmp_path / "merged")])  # fmt: skip
    assert result.exit_code == 0, result.output


def test_tables_of_an_adapter_say_what_they_miss(files):
    with_base = run(files / "llama", "--base", files / "llama_base")
    without = run(files / "llama", "--base", files / "llama_base", "--json")
    assert "largest |s/w|" in with_base and "down_proj" in with_base and "\ntotal" in with_base
    assert json.loads(without)["overlap"] is None


def test_a_mask_needs_no_base(files):
    output = run(files / "llama_layer.safetensors")
    assert "mask" in output.splitlines()[0] and "salience gradient, scope layer, samples" in output.splitlines()[0]
    assert [line.split()[0] for line in output.splitlines() if line[:1].isdigit()] == ["0", "1"]
    assert "mean |s|" not in output
    told = json.loads(run(files / "gpt2_layer.safetensors", "--json"))["files"][0]
    assert (told["matrices"]["transformer.h.0.mlp.c_fc"]["in_features"], told["kind"]) == (26, "mask")


def test_two_masks_overlap(files):
    paths = [files / f"llama_{scope}.safetensors" for scope in ("layer", "global")]
    tensors = [load_file(path) for path in paths]
    told = json.loads(run(*paths, "--json"))
    name = "model.layers.1.mlp.up_proj"
    entries = []
    for file in tensors:
        rows = torch.repeat_interleave(file[f"{name}.spft_row_offsets"].diff().long())
        entries.append(set(zip(rows.tolist(), file[f"{name}.spft_columns"].tolist())))
    found = told["overlap"]["matrices"][name]
    assert found["shared"] == len(entries[0] & entries[1]) > 0
    assert found["jaccard"] == pytest.approx(len(entries[0] & entries[1]) / len(entries[0] | entries[1]))
    assert sum(each["shared"] for each in told["overlap"]["layers"].values()) == told["overlap"]["total"]["shared"]
    assert "Jaccard" in run(*paths)
    assert json.loads(run(paths[0], paths[0], "--json"))["overlap"]["total"]["jaccard"] == 1


def test_a_mask_file_without_shapes_takes_them_from_the_base(files, tmp_path):
    path = tmp_path / "old.safetensors"
    save_file(load_file(files / "gpt2_layer.safetensors"), path)
    assert "name the folder of the base model with `--base`" in run(path, code=2)
    new, old = (
        json.loads(run(*arguments, "--json"))["files"][0]["matrices"]
        for arguments in ([files / "gpt2_layer.safetensors"], [path, "--base", files / "gpt2_base"])
    )
    assert new == old


def damaged(files, folder, name):
    if name == "another_kind":
        save_file({"weight": torch.ones(2)}, folder / "another.safetensors")
        return [folder / "another.safetensors"]
    if name == "truncated":
        (folder / "short.safetensors").write_bytes((files / "llama_layer.safetensors").read_bytes()[:-3])
        return [folder / "short.safetensors"]
    if name == "text":
        (folder / "notes.txt").write_text("no mask")
        return [folder / "notes.txt"]
    if name == "lora":
        shutil.copytree(files / "llama", folder / "lora")
        (folder / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
        return [folder / "lora"]
    if name == "order":
        tensors = load_file(files / "llama_layer.safetensors")
        key = next(key for key in tensors if key.endswith("spft_columns"))
        save_file(tensors | {key: tensors[key].int().flip(0).to(torch.uint16)}, folder / "order.safetensors")
        return [folder / "order.safetensors", "--base", files / "llama_base"]
    if name == "two_models":
        return [files / f"{model}_layer.safetensors" for model in ("llama", "gpt2")]
    if name == "other_base":
        return [files / "llama", "--base", files / "gpt2_base"]
    return {"missing": [folder / "none"], "no_base": [files / "llama", "--base", folder], "folder": [folder],
            "three": [files / "llama"] * 3, "option": [files / "llama", "--jsn"], "none": []}[name]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing", "does not exist"),
        ("another_kind", "is another kind of file"),
        ("truncated", "not a complete safetensors file"),
        ("text", "not a complete safetensors file"),
        ("lora", "`peft_type: LORA` must be SPFT"),
        ("order", "columns must ascend"),
        ("two_models", "belong to different models"),
        ("other_base", "is not the model that the adapter belongs to"),
        ("no_base", "its config cannot be read"),
        ("folder", "there is no adapter_config.json"),
        ("three", "3 files were given"),
        ("option", "No such option"),
        ("none", "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(files, tmp_path, name, part):
    output = run(*damaged(files, tmp_path, name), code=2)
    assert part in output
    assert output.startswith("Error: ") and output.count("\n") == 1
