"""Sums of adapters, and adapters of other methods."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, ShiraConfig, get_peft_model
from peft.utils.merge_utils import ties
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter, read_adapter, write_adapter
from axolotl_spft.checkpoint.combine import combine
from axolotl_spft.checkpoint.conversion import convert
from axolotl_spft.errors import SpftFileError
from axolotl_spft.tools.cli import spft
from tests.checkpoint.saved import contents, save_adapter, save_base, tied_llama
from tests.models import logits, tiny_gpt2, tiny_llama, with_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tiny_llama, torch.float32)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    targets = (["q_proj", "up_proj"], ["up_proj", "down_proj"], ["up_proj"])
    return [save_adapter(folder / str(i), base, i, target_modules=each) for i, each in enumerate(targets)]


def _dense(adapter: SavedAdapter, module: str) -> torch.Tensor:
    delta = adapter.deltas[module]
    # matrices of one shape, however many columns each file shows
    dense = torch.zeros(delta.shape[0], 64)
    rows = torch.repeat_interleave(torch.arange(delta.shape[0]), delta.mask.row_offsets.diff())
    dense[rows, delta.mask.columns.long()] = delta.values.float()
    return dense


def test_one_adapter_of_weight_1_is_the_identity(folders, tmp_path):
    for method in ("linear", "ties"):
        adapter, _ = combine([read_adapter(folders[0])], [1.0], method=method)
        write_adapter(tmp_path, adapter)
        before, after = (load_file(folder / WEIGHTS_FILE) for folder in (folders[0], tmp_path))
        assert before.keys() == after.keys()
        for key in before:
            assert before[key].dtype == after[key].dtype and torch.equal(before[key].int(), after[key].int())
            assert before[key].dtype != torch.float32 or torch.equal(before[key], after[key])
        one, two = (PeftModel.from_pretrained(tiny_llama(), folder) for folder in (folders[0], tmp_path))
        assert torch.equal(logits(one), logits(two))


def test_sums_and_elected_signs_are_those_of_dense_matrices(folders):
    adapters, weights = [read_adapter(folder) for folder in folders], [1.0, -0.5, 2.0]
    summed, report = combine(adapters, weights)
    elected, _ = combine(adapters, method="ties")
    assert set(summed.deltas) == {name for adapter in adapters for name in adapter.deltas}
    module = "model.layers.1.mlp.up_proj"
    dense = [_dense(adapter, module) for adapter in adapters]
    expected = sum(weight * each for weight, each in zip(weights, dense))
    torch.testing.assert_close(_dense(summed, module), expected, rtol=0, atol=1e-7)
    expected = ties(dense, torch.ones(3), density=1.0)
    torch.testing.assert_close(_dense(elected, module), expected, rtol=0, atol=1e-7)
    row = report["modules"]["up_proj"]
    layers = [torch.stack([_dense(a, f"model.layers.{i}.mlp.up_proj") for a in adapters]) for i in (0, 1)]
    signs = [(each * torch.tensor(weights)[:, None, None]).sign() for each in layers]
    assert row["positions"] == sum(int((each != 0).any(0).sum()) for each in signs)
    assert row["shared"] == sum(int(((each != 0).sum(0) > 1).sum()) for each in signs)
    assert row["conflicts"] == sum(int(((each > 0).any(0) & (each < 0).any(0)).sum()) for each in signs)
    assert 0 < row["conflicts"] < row["shared"] < row["positions"] == row["kept"]


def test_density_keeps_the_largest_of_each_matrix(folders):
    adapters = [read_adapter(folder) for folder in folders]
    whole, _ = combine(adapters)
    few, report = combine(adapters, density=0.05)
    assert report["values"] == few.nnz == sum(row["kept"] for row in report["modules"].values())
    for name, delta in few.deltas.items():
        count = round(0.05 * delta.shape[0] * delta.shape[1])
        assert delta.mask.nnz == count
        assert delta.values.abs().min() == whole.deltas[name].values.abs().topk(count).values[-1]


def test_the_sum_is_loaded_by_peft(folders, tmp_path):
    adapter, _ = combine([read_adapter(folder) for folder in folders])
    write_adapter(tmp_path, adapter)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload()
    module = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(module).weight - tiny_llama().get_submodule(module).weight
    torch.testing.assert_close(weight.detach(), _dense(adapter, module)[:, : weight.shape[1]], rtol=0, atol=1e-6)


def test_the_record_of_a_sum_is_not_the_first_adapters(folders, tmp_path):
    """What PEFT loads says of itself what `adapter_config.json` says, whichever adapter it is loaded over."""
    adapters = [read_adapter(folder) for folder in folders[:2]]
    for name, some, density in (("sum", adapters, None), ("thinned", adapters[:1], 0.01)):
        adapter, _ = combine(some, density=density)
        write_adapter(tmp_path / name, adapter)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name).peft_config["default"]
        assert (
            (loaded.mask_source or {})
            == (adapter.config["mask_source"] or {})
            == read_adapter(tmp_path / name).mask_source
        )
        assert (loaded.nnz, loaded.num_values, loaded.density) == (adapter.nnz, adapter.nnz, None)
        assert bool(loaded.mask_source) == (name == "sum")


def test_a_sum_has_the_branch_that_all_of_them_name(folders):
    one, other = (read_adapter(folder) for folder in folders[:2])
    one.config["revision"] = other.config["revision"] = "v2"
    assert combine([one, other])[0].config["revision"] == "v2"
    other.config["revision"] = "main"
    assert combine([one, other])[0].config["revision"] is None


def test_what_cannot_be_combined_is_one_clear_error(folders, base, tmp_path):
    adapters = [read_adapter(folder) for folder in folders]
    whole = read_adapter(save_adapter(tmp_path / "whole", base, modules_to_save=["lm_head"], target_modules=["q_proj"]))
    for arguments, message in (
        ((adapters, [1.0]), "3 adapters, but 1 weights"),
        ((adapters, None, 2.0), "`density 2.0` must be in"),
        ((adapters, None, None, "dare"), "`method dare` must be one of linear, ties"),
        (([adapters[0], whole],), r"^lm_head.weight: not the same in all.*`modules_to_save`"),
        ((adapters, [1.0, float("nan"), 1.0]), r"`weights 1.0, nan, 1.0` must be finite numbers"),
        ((adapters, [1.0, float("inf"), 1.0]), r"`weights 1.0, inf, 1.0` must be finite numbers"),
        ((adapters, [1.0, 1e40, 1.0]), r"up_proj: a value of the sum does not fit into float32: take smaller"),
        ((adapters, [1e40, 1.0, 1.0], None, "ties"), r"q_proj: a value of the sum does not fit into float32"),
    ):
        with pytest.raises(SpftFileError, match=message):
            combine(*arguments)
    assert combine([whole])[0].others.keys() == whole.others.keys()


def grown_llama(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(70)
    return model


def save_grown(folder, base, seed: int, targets: list[str]):
    """An adapter of a model with new tokens, of which PEFT saves the embeddings, and the tokenizer."""
    with_adapter(grown_llama(base), seed, target_modules=targets).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokens": 70}')
    return folder


@pytest.mark.parametrize("other", ["grown", "grown, with a delta on it", "as it was"])
def test_embeddings_that_have_grown_untrained_are_handed_on(base, folders, tmp_path, other):
    one = save_grown(tmp_path / "one", base, 1, ["q_proj"])
    two = tmp_path / "two"
    if other == "as it was":
        shutil.copytree(folders[2], two)
        (two / "tokenizer_config.json").write_text('{"tokens": 67}')
    else:
        save_grown(two, base, 2, ["lm_head"] if "delta" in other else ["up_proj"])
    arguments = ["combine", str(two), str(one), "--output", str(tmp_path / "sum")]
    result = CliRunner().invoke(spft, arguments)
    assert result.exit_code == 0, result.output
    assert "70" in (tmp_path / "sum" / "tokenizer_config.json").read_text()
    before = grown_llama(base).state_dict()
    first, second, found = (
        PeftModel.from_pretrained(grown_llama(base), tmp_path / name).merge_and_unload().state_dict()
        for name in ("one", "two", "sum")
    )
    for name, weight in before.items():
        torch.testing.assert_close(found[name], first[name] + second[name] - weight, rtol=0, atol=1e-6)


def test_what_is_whole_and_not_the_same_is_named(base, tmp_path):
    one = read_adapter(save_grown(tmp_path / "one", base, 1, ["q_proj"]))
    assert combine([one, one])[0].others.keys() == one.others.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    other = replace(one, others=one.others | {"lm_head.weight": one.others["lm_head.weight"] + 1})
    small = read_adapter(save_adapter(tmp_path / "small", base, target_modules=["lm_head"]))
    for adapters in ([one, other], [one, small]):
        with pytest.raises(SpftFileError, match=r"^lm_head.weight: not the same in all of the adapters"):
            combine(adapters)


@pytest.mark.parametrize("weights", ["nan,1", "1e40,1"])
def test_a_sum_that_is_no_number_leaves_the_adapter_in_its_output_as_it_was(folders, tmp_path, weights):
    output = shutil.copytree(folders[0], tmp_path / "output")
    before = contents(output)
    command = ["combine", str(output), str(folders[1]), f"--weights={weights}", "--output", str(output)]
    result = CliRunner().invoke(spft, command)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and contents(output) == before


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_could_not_be_read_is_not_written(folders, tmp_path, value):
    adapter = read_adapter(folders[0])
    module = next(iter(adapter.deltas))
    adapter.deltas[module].values[-1] = value
    with pytest.raises(SpftFileError, match=rf"{module}: a value is NaN or infinite: nothing was written"):
        write_adapter(tmp_path / "output", adapter)
    assert not (tmp_path / "output").exists()


def test_shira_is_converted_to_ours_and_back(base, tmp_path):
    torch.manual_seed(3)
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=5, init_weights=False)
    shira = get_peft_model(tiny_llama(), config)
    shira.save_pretrained(tmp_path / "shira")
    for given in ({}, {"base": base}):
        report = convert(tmp_path / "shira", tmp_path / "ours", **given)
        ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
        merged, expected = (model.merge_and_unload().state_dict() for model in (ours, get_peft_copy(tmp_path)))
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        assert report["values"] == read_adapter(tmp_path / "ours").nnz
    back = convert(tmp_path / "ours", tmp_path / "back")
    assert back["rank"] == 2 and back["zeros_added"] == 0
    first, second = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("shira", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def get_peft_copy(folder):
    return PeftModel.from_pretrained(tiny_llama(), folder / "shira")


def test_a_sparse_adapter_becomes_shira_with_zeros(base, folders, tmp_path):
    bare = _without_record(folders[0], tmp_path / "bare")
    assert convert(bare, tmp_path / "shira")["modules_checked"]
    config = json.loads((bare / CONFIG_FILE).read_text())
    (bare / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "elsewhere")}))
    with pytest.raises(SpftFileError, match="add `--base`"):
        convert(bare, tmp_path / "shira")
    report = convert(folders[0], tmp_path / "shira", "shira", base)
    assert report["zeros_added"] > 0
    one, two = (PeftModel.from_pretrained(tiny_llama(), folder) for folder in (folders[0], tmp_path / "shira"))
    merged, expected = (model.merge_and_unload().state_dict() for model in (two, one))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    with pytest.raises(SpftFileError, match="of the kind spft already"):
        convert(folders[0], tmp_path / "again", "spft")


@pytest.mark.parametrize("make, targets, module", [
    (tiny_llama, ["embed_tokens", "q_proj"], "model.embed_tokens"),
    (tiny_gpt2, ["c_attn"], r"transformer\.h\.0\.attn\.c_attn"),
    (tied_llama, ["lm_head", "embed_tokens"], "model.embed_tokens"),
])  # fmt: skip
def test_what_shira_does_not_adapt_is_refused_before_anything_is_written(tmp_path, make, targets, module):
    base = save_base(tmp_path / "base", make, torch.float32)
    adapter = save_adapter(tmp_path / "run", base, target_modules=targets, density=0.02)
    for given in ({}, {"base": base}):
        with pytest.raises(SpftFileError, match=f"{module} .*SHiRA.*: merge it"):
            convert(adapter, tmp_path / "shira", **given)
    assert not (tmp_path / "shira").exists()


def test_a_base_that_is_not_here_leaves_the_modules_unchecked(tmp_path, base):
    adapter = save_adapter(tmp_path / "run", base)
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "elsewhere")}))
    arguments = ["convert", str(adapter), "--output", str(tmp_path / "shira")]
    result = CliRunner().invoke(spft, arguments)
    assert result.exit_code == 0 and "not known whether SHiRA adapts all of its modules" in result.stdout
    result = CliRunner().invoke(spft, [*arguments, "--base", str(base)])
    assert result.exit_code == 0 and "not known" not in result.stdout
    assert CliRunner().invoke(spft, [*arguments, "--base", str(tmp_path / "absent")]).exit_code == 2


def _without_record(folder, target):
    adapter = read_adapter(folder)
    write_adapter(target, adapter)
    tensors = load_file(target / WEIGHTS_FILE)
    save_file({key: tensor for key, tensor in tensors.items() if "record" not in key}, target / WEIGHTS_FILE)
    return target


def test_a_shira_file_without_indices_or_with_wrong_ones_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), ShiraConfig(r=1, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = next(key for key in tensors if "indices" in key)
    for changed, message in (
        ({k: v for k, v in tensors.items() if "indices" not in k}, "has no shira_indices"),
        (tensors | {key: tensors[key][:, :-1]}, "but indices of"),
        (tensors | {key: torch.zeros_like(tensors[key])}, "has an index twice"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(SpftFileError, match=message):
            convert(tmp_path, tmp_path / "ours")
