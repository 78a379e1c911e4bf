"""Merges that stream a checkpoint, against merges in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaModel

from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.checkpoint.report import describe_merge
from axolotl_spft.checkpoint.shards import INDEX_FILE, Shards
from axolotl_spft.checkpoint.shira import write_shira
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.state import spft_layers
from tests.checkpoint.saved import BASES, contents, make_older, merged_in_memory, save_adapter, save_base
from tests.models import tiny_gpt2, tiny_llama, with_adapter


def _equal(folder, expected):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if state[name].dtype != expected[name].dtype] == []
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("layout", ["20KB", "5GB"])
def test_a_streamed_merge_is_the_merge_in_memory(tmp_path, name, layout):
    base = save_base(tmp_path / "base", BASES[name], max_shard_size=layout)
    targets = {"target_modules": ["lm_head", "q_proj", "down_proj"]} if name in ("tied", "llama") else {}
    adapter = save_adapter(tmp_path / "adapter", base, **targets)
    report = merge(adapter, tmp_path / "merged", base)
    _equal(tmp_path / "merged", merged_in_memory(base, adapter))
    old, new = Shards(base), Shards(tmp_path / "merged")
    assert list(new.headers) == list(old.headers) and (len(old.headers) > 1) == (layout == "20KB")
    assert new.file_of.keys() == old.file_of.keys()
    assert report["matrices"] == report["matrices_measured"] and report["values"] == read_adapter(adapter).nnz
    if layout == "20KB":
        index = json.loads((tmp_path / "merged" / INDEX_FILE).read_text())
        data = sum(e.stop - e.start for h in new.headers.values() for e in h.entries.values())
        assert index["metadata"]["total_size"] == data and index["weight_map"].keys() == new.file_of.keys()
    config = json.loads((base / "config.json").read_text())
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged == config
    for file in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes()
    assert not (tmp_path / "merged" / ".spft-merge").exists()


def test_a_delta_of_a_head_alone_unties_it(tmp_path):
    """As other tools train it, such as those whose adapters are converted; here a tied model has one delta for both."""
    base = save_base(tmp_path / "base", BASES["tied"])
    untied = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    untied.save_pretrained(tmp_path / "untied")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "untied", target_modules=["lm_head", "q_proj"])
    merge(adapter, tmp_path / "merged", base)
    _equal(tmp_path / "merged", merged_in_memory(tmp_path / "untied", adapter))
    assert Shards(tmp_path / "merged").file_of.keys() - Shards(base).file_of.keys() == {"lm_head.weight"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(SpftFileError, match=r"lm_head.*load the model with `tie_word_embeddings: false`"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_an_embedding_that_the_base_has_under_the_name_of_its_head(tmp_path):
    base = save_base(tmp_path / "base", BASES["tied"], max_shard_size="5GB")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    expected = merged_in_memory(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter, tmp_path / "merged", base)
    assert Shards(tmp_path / "merged").file_of.keys() == tensors.keys()
    _equal(tmp_path / "merged", expected)


def test_a_base_that_has_a_tied_weight_twice(tmp_path):
    base = save_base(tmp_path / "base", BASES["tied"], max_shard_size="5GB")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    expected = merged_in_memory(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter, tmp_path / "merged", base)
    # a model ties them only where they are equal
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    _equal(tmp_path / "merged", expected)


def test_a_base_without_the_prefix_of_its_head(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "whole", target_modules="all-linear")
    LlamaModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj.weight" in Shards(tmp_path / "base").file_of
    merge(adapter, tmp_path / "merged", tmp_path / "base")
    assert Shards(tmp_path / "merged").file_of.keys() == Shards(tmp_path / "base").file_of.keys()
    _equal(tmp_path / "merged", merged_in_memory(tmp_path / "whole", adapter))


def test_whole_modules_and_a_tokenizer_of_the_adapter(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"], target_modules=["q_proj"])
    (adapter / "tokenizer_config.json").write_text('{"of": "adapter"}')
    merge(adapter, tmp_path / "merged", base)
    expected = merged_in_memory(base, adapter)
    expected["lm_head.weight"] = read_adapter(adapter).others["lm_head.weight"].to(torch.bfloat16)
    _equal(tmp_path / "merged", expected)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == {"of": "adapter"}
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
_INT8 = {"load_in_8bit": True}


@pytest.mark.parametrize("make, settings", [(tiny_llama, _NF4), (tiny_gpt2, _FP4), (tiny_llama, _INT8)])
def test_a_merge_onto_the_quantized_base_is_what_training_computed_with(tmp_path, make, settings):
    base = save_base(tmp_path / "base", make)
    adapter = save_adapter(tmp_path / "adapter", base)
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**settings))
    model = PeftModel.from_pretrained(loaded, adapter)
    expected = {}
    for name, layer in spft_layers(model.base_model.model).items():
        values, delta = layer.spft_values["default"], layer.mask("default")
        weight = layer.read_weight().clone()
        weight.view(-1)[positions(delta, layer.in_features)] += values.detach()
        expected[name] = weight.to(torch.bfloat16)
    onto_quantized = merge(adapter, tmp_path / "quantized", base, quantization=settings)
    onto_base = merge(adapter, tmp_path / "plain", base, onto="base", quantization=settings)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    for name, weight in expected.items():
        found = merged.get_submodule(name).weight
        assert torch.equal(found.t() if make is tiny_gpt2 else found, weight), name
    _equal(tmp_path / "plain", merged_in_memory(base, adapter))
    # rounding to the dtype of the base, which fp32 differences of 8 bits do not survive
    assert onto_quantized["difference_from_trained"] <= (2**-8 if settings is _INT8 else 0)
    assert onto_base["difference_from_trained"] > 2 * onto_quantized["difference_from_trained"]


def save_repaired(folder, base, seed: int = 0, scale: float = 1e-3):
    """An adapter that repairs ``base`` in NF4, with random values."""
    settings = BitsAndBytesConfig(**_NF4)
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    model = with_adapter(loaded, seed, target_modules=["q_proj", "down_proj"])
    checkpoint = BaseCheckpoint(base, model.get_base_model())
    for name, layer in spft_layers(model.base_model.model).items():
        at = positions(layer.mask("default"), layer.in_features)
        originals = checkpoint.read_matrix(name).view(-1)[at]
        layer.set_mask("default", layer.mask("default"), layer.values("default").data * scale, originals)
    record_mask(model.base_model, "default", {"repair": 0.5, "repaired": model.peft_config["default"].nnz})
    model.save_pretrained(folder)
    return model


def test_a_repaired_adapter_has_its_entries_from_the_unquantized_weights_on_both_bases(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    model = save_repaired(tmp_path / "adapter", base)
    adapter = tmp_path / "adapter"
    merge(adapter, tmp_path / "by-its-record", base)
    make_older(adapter)
    with pytest.raises(SpftFileError, match=r"repairs a quantized base.*--quantization nf4`, or `--onto base`"):
        merge(adapter, tmp_path / "merged", base)
    reports = {
        onto: merge(adapter, tmp_path / f"onto-{onto}", base, onto, _NF4, torch.bfloat16)
        for onto in ("base", "quantized")
    }
    merge(adapter, tmp_path / "without", base, "base")
    folders = {"recorded": "by-its-record", "quantized": "onto-quantized", "base": "onto-base", "without": "without"}
    merged = {name: BaseCheckpoint(tmp_path / folder, tiny_llama()) for name, folder in folders.items()}
    original = BaseCheckpoint(base, tiny_llama())
    for name, layer in spft_layers(model.base_model.model).items():
        delta, _ = layer._make_delta(("default",))
        with layer.effective_weight(layer.values("default"), delta) as weight:
            trained = weight.to(torch.bfloat16)
        inside = torch.zeros(trained.shape, dtype=torch.bool)
        inside.view(-1)[positions(layer.mask("default"), layer.in_features)] = True
        assert torch.equal(merged["recorded"].read_matrix(name), trained)
        assert torch.equal(merged["quantized"].read_matrix(name), trained)
        onto_base = torch.where(inside, trained, original.read_matrix(name))
        assert torch.equal(merged["base"].read_matrix(name), onto_base)
        assert torch.equal(merged["without"].read_matrix(name), onto_base)
        assert not torch.equal(onto_base, trained) and not torch.equal(onto_base, original.read_matrix(name))
    assert reports["quantized"]["difference_from_trained"] == 0 < reports["base"]["difference_from_trained"]
    assert reports["base"]["repaired"] == model.peft_config["default"].nnz
    assert "were trained from W, the weight before quantization" in describe_merge(reports["base"])
    other = save_base(tmp_path / "other", lambda dtype: tiny_llama(dtype).apply(_double))
    with pytest.raises(SpftFileError, match=r"are not those of .*name the unquantized base model that was trained"):
        merge(adapter, tmp_path / "wrong", other, "base")


def test_a_sum_with_an_adapter_that_repairs_nothing_is_merged_too(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    model = save_repaired(tmp_path / "adapter", base)
    model.load_adapter(save_adapter(tmp_path / "other", base, 1, target_modules=["q_proj", "down_proj"]), "plain")
    model.add_weighted_adapter(["default", "plain"], [1.0, 0.5], "sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    with pytest.raises(SpftFileError, match=r"are not those of .*add how it was quantized"):
        merge(tmp_path / "sum", tmp_path / "merged", base, "base")
    merged = {}
    for onto in ("base", "quantized"):
        report = merge(tmp_path / "sum", tmp_path / f"onto-{onto}", base, onto, _NF4, torch.bfloat16)
        merged[onto] = BaseCheckpoint(tmp_path / f"onto-{onto}", tiny_llama())
    assert report["difference_from_trained"] == 0
    original = BaseCheckpoint(base, tiny_llama())
    for name, layer in spft_layers(model.base_model.model).items():
        delta, _ = layer._make_delta(("sum",))
        with layer.effective_weight(layer.values("sum"), delta) as weight:
            assert torch.equal(merged["quantized"].read_matrix(name), weight.to(torch.bfloat16))
        expected = original.read_matrix(name).view(-1)
        at = positions(delta.mask, layer.in_features)
        expected[at] = (expected[at].float() + layer.values("sum").detach()).to(torch.bfloat16)
        assert torch.equal(merged["base"].read_matrix(name).view(-1), expected)


def _double(module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data *= 2


def test_repaired_adapters_are_combined_with_repaired_ones_and_are_no_shira(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    models = [save_repaired(tmp_path / f"{seed}", base, seed) for seed in (0, 1)]
    adapters = [read_adapter(tmp_path / f"{seed}") for seed in (0, 1)]
    both, _ = combine(adapters, [1.0, 0.5])
    for name, layer in spft_layers(models[0].base_model.model).items():
        weight = BaseCheckpoint(base, models[0].get_base_model()).read_matrix(name).view(-1)
        delta = both.deltas[name]
        assert torch.equal(delta.originals, weight[positions(delta.mask, layer.in_features)])
    write_adapter(tmp_path / "both", both)
    assert read_adapter(tmp_path / "both").repaired == both.nnz > max(each.nnz for each in adapters)
    # of the same base in a run in float32
    for name, delta in adapters[0].deltas.items():
        adapters[0].deltas[name] = replace(delta, originals=delta.originals.float() * (1 + 2**-12))
    for pair in (adapters, adapters[::-1]):
        mixed, _ = combine(pair)
        for name, delta in adapters[0].deltas.items():
            of_sum, own = (positions(each.deltas[name].mask, delta.shape[1]) for each in (mixed, adapters[0]))
            assert torch.equal(mixed.deltas[name].originals[torch.isin(of_sum, own)], delta.originals)
    fewer, _ = combine(adapters[:1], density=0.005)
    write_adapter(tmp_path / "fewer", fewer)
    assert 0 < read_adapter(tmp_path / "fewer").repaired == fewer.nnz < adapters[0].nnz
    plain = read_adapter(save_adapter(tmp_path / "plain", base, target_modules=["q_proj"]))
    with pytest.raises(SpftFileError, match=r"some of the adapters repair a quantized base.*add_weighted_adapter"):
        combine([adapters[0], plain])
    with pytest.raises(SpftFileError, match="SHiRA can only add"):
        write_shira(tmp_path / "shira", adapters[0])


def _in_a_process(target, *args) -> int:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def _with_a_full_disk(arguments, message):
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, soft[1]))
    try:
        merge(*arguments)
    except SpftFileError as error:
        message.write_text(str(error))
        sys.exit(1)


def _killed_at_the_third_file(arguments):
    replace, left = os.replace, [3]

    def killing(*paths):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = killing
    merge(*arguments)


def test_a_killed_merge_goes_on_and_a_full_disk_leaves_the_one_before(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    first, second = (save_adapter(tmp_path / name, base, seed) for seed, name in enumerate(("first", "second")))
    merge(second, tmp_path / "whole", base)
    merge(first, tmp_path / "output", base)
    before = contents(tmp_path / "output")
    arguments = [tmp_path / name for name in ("second", "output", "base")]
    assert _in_a_process(_with_a_full_disk, arguments, tmp_path / "message") == 1
    message = (tmp_path / "message").read_text()
    assert "cannot be written (File too large): what was there is as it was" in message
    assert contents(tmp_path / "output") == before
    assert _in_a_process(_killed_at_the_third_file, arguments) == -signal.SIGKILL
    now = contents(tmp_path / "output")
    finished = [name for name in now if name.startswith(".spft-merge/model") and name.endswith(".safetensors")]
    assert len(finished) == 2 and before.items() <= now.items()
    # a file of the right name alone is not enough
    damaged = tmp_path / "output" / finished[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report = merge(second, tmp_path / "output", base)
    assert len(report["files_written"]) == len(report["files"]) - 1
    assert contents(tmp_path / "output") == contents(tmp_path / "whole")
    assert merge(second, tmp_path / "output", base)["files_written"] == []
    assert contents(tmp_path / "output") == contents(tmp_path / "whole")


def test_another_layout_leaves_nothing_of_the_one_before(tmp_path):
    many, one = (save_base(tmp_path / layout, tiny_llama, max_shard_size=layout) for layout in ("20KB", "5GB"))
    adapter = save_adapter(tmp_path / "adapter", one)
    for base in (many, one, many):
        merge(adapter, tmp_path / "merged", base)
        assert list(Shards(tmp_path / "merged").headers) == list(Shards(base).headers)
        _equal(tmp_path / "merged", merged_in_memory(base, adapter))


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from axolotl_spft.checkpoint.adapter import SavedAdapter, SavedDelta, write_adapter\n"
        "from axolotl_spft.checkpoint.merge import merge\n"
        "from axolotl_spft.ops.mask.csr import mask_from_positions\n"
        "def run(layers):\n"
        "    folder = f'{sys.argv[1]}/{layers}'\n"
        "    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,\n"
        "                         num_attention_heads=4, num_key_value_heads=4, vocab_size=64)\n"
        "    with torch.device('meta'):\n"
        "        model = LlamaForCausalLM(config).to(torch.bfloat16)\n"
        "    model.to_empty(device='cpu').save_pretrained(folder, max_shard_size='9MB')\n"
        "    del model\n"
        "    mask = mask_from_positions(torch.arange(0, 2048 * 512, 200), 2048, 512)\n"
        "    delta = SavedDelta(torch.ones(mask.nnz), mask, (2048, 512))\n"
        "    write_adapter(folder + '-adapter', SavedAdapter({'peft_type': 'SPFT'},\n"
        "        {f'model.layers.{i}.mlp.up_proj': delta for i in range(layers)}))\n"
        "    return folder\n"
        "def peak():\n"
        "    return int(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1]) / 1024\n"
        "few, many = run(3), run(12)\n"
        "def of(folder):\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    files = merge(folder + '-adapter', folder + '-merged', folder)['files']\n"
        "    print(len(files), peak())\n"
        "of(few); of(few); of(many)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (few, _), (_, small), (many, big) = (map(float, line.split()) for line in done.stdout.splitlines()[-3:])
    assert few == 3 and many == 12
    assert big - small < 24


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": "other"}, "name that base model|name the base model"),
        ({"base": "nowhere"}, "neither a folder nor a model"),
        ({"output": "base"}, "is the folder of the base model"),
        ({"output": "adapter"}, "is the folder of the adapter"),
        ({"onto": "quantized"}, "records that its base was not quantized: leave the option out"),
        ({"adapter_folder": "base"}, "adapter_config.json"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, change, message):
    base = save_base(tmp_path / "base", tiny_llama)
    save_base(tmp_path / "other", tiny_gpt2)
    adapter = save_adapter(tmp_path / "adapter", base)
    arguments = {"adapter_folder": adapter, "output": tmp_path / "merged", "base": base}
    arguments |= {key: value if key == "onto" else str(tmp_path / value) for key, value in change.items()}
    before = contents(tmp_path)
    with pytest.raises(SpftFileError, match=message):
        merge(**arguments)
    assert contents(tmp_path) == before
