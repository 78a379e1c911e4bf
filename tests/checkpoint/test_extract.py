"""Sparse adapters out of fully fine-tuned checkpoints."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_spft.checkpoint.adapter import write_adapter
from axolotl_spft.checkpoint.extract import extract, values_between
from axolotl_spft.checkpoint.largest import taken, threshold
from axolotl_spft.checkpoint.merge import merge
from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.ops.weight.scatter import rounded_sum
from tests.checkpoint.saved import save_base, tied_llama, tiny_mixtral
from tests.models import logits, same_weights, tiny_gpt2, tiny_llama, weights_of


def _save_tuned(base, folder, seed=1):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * parameter.abs() * (torch.rand_like(parameter) < 0.7)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_density_1_rebuilds_the_tuned_model(tmp_path, make, dtype):
    base = save_base(tmp_path / "base", make, dtype)
    tuned = _save_tuned(base, tmp_path / "tuned")
    adapter, report = extract(base, tuned, 1.0, "global" if make is tiny_llama else "layer")
    # stacked experts are no linear layers, nor modules that PEFT keeps whole
    experts = [name for name in report["parameters_not_kept"] if ".experts." in name]
    assert report["error_left"] == 0 and report["parameters_not_kept"] == experts
    assert len(experts) == (4 if make is tiny_mixtral else 0)
    write_adapter(tmp_path / "adapter", adapter)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "tuned")
    )
    assert [name for name in expected if not torch.equal(merged[name], expected[name]) and name not in experts] == []
    assert 0 < adapter.nnz < sum(shape[0] * shape[1] for shape in (d.shape for d in adapter.deltas.values()))


def test_what_a_model_ties_is_kept_under_each_of_its_names_so_that_peft_loads_it(tmp_path):
    base = save_base(tmp_path / "base", tied_llama, torch.float32, "5GB")
    tuned = _save_tuned(base, tmp_path / "tuned")
    adapter, report = extract(base, tuned, 1.0)
    assert {"lm_head", "model.embed_tokens"} <= set(report["modules_kept_whole"])
    write_adapter(tmp_path / "adapter", adapter)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = AutoModelForCausalLM.from_pretrained(tuned)
    assert torch.allclose(logits(loaded), logits(expected), atol=1e-4)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_weights(merged, weights_of(expected)) and merged.config.tie_word_embeddings


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_largest_differences_are_kept_and_the_error_is_told(tmp_path, scope):
    base = save_base(tmp_path / "base", tiny_llama)
    tuned = _save_tuned(base, tmp_path / "tuned")
    adapter, report = extract(base, tuned, 0.05, scope)
    first, second = (AutoModelForCausalLM.from_pretrained(each) for each in (base, tuned))
    names = [
        name for name, module in first.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    all_of = {
        name: (second.get_submodule(name).weight - first.get_submodule(name).weight.double()).detach() for name in names
    }
    moved = torch.cat([each.flatten() for each in all_of.values()])
    left = 0.0
    for name, difference in all_of.items():
        chosen = torch.zeros(difference.numel(), dtype=torch.bool)
        if name in adapter.deltas:
            chosen[positions(adapter.deltas[name].mask, difference.shape[1])] = True
        flat = difference.flatten()
        pool, count = (flat, round(0.05 * len(flat))) if scope == "layer" else (moved, round(0.05 * len(moved)))
        least = pool.abs().topk(count).values[-1]
        assert (flat[chosen].abs() >= least).all() and (flat[~chosen].abs() <= least).all()
        left += float(flat[~chosen].square().sum())
        if scope == "layer":
            assert chosen.sum() == count
    assert report["error_left"] == pytest.approx((left / float(moved.square().sum())) ** 0.5)
    if scope == "global":
        assert adapter.nnz == round(0.05 * len(moved))
    # PEFT loads it, whole modules and all
    write_adapter(tmp_path / "adapter", adapter)
    merged = PeftModel.from_pretrained(first, tmp_path / "adapter").merge_and_unload()
    name = next(iter(adapter.deltas))
    at = positions(adapter.deltas[name].mask, adapter.deltas[name].shape[1])
    assert torch.equal(*(each.get_submodule(name).weight.take(at) for each in (merged, second)))
    assert torch.equal(merged.model.norm.weight, second.model.norm.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_reach_what_they_shall_where_float32_does_not(dtype):
    before = torch.tensor([1.0, 1.0, -3.0, 1e-4, 0.0], dtype=dtype)
    after = torch.tensor([1e-6, 1 / 3, 2.0, 1.0, 5.0], dtype=dtype)
    assert torch.equal(rounded_sum(before, values_between(before, after)), after)
    assert values_between(before[2:3], after[2:3]).dtype == torch.float32


def test_a_tuned_model_of_more_bits_than_its_base_is_reached_with_float32(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter += torch.randn_like(parameter) * 0.01 * ("norm" not in name)
    tuned.save_pretrained(tmp_path / "tuned")
    adapter, report = extract(base, tmp_path / "tuned", 1.0)
    assert {delta.values.dtype for delta in adapter.deltas.values()} == {torch.float32}
    assert report["modules_kept_whole"] == ["lm_head", "model.embed_tokens"]
    write_adapter(tmp_path / "adapter", adapter)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in tuned.state_dict().items())


def test_the_threshold_is_that_of_a_full_sort():
    torch.manual_seed(0)
    parts = [torch.randn(37, 5).bfloat16(), torch.zeros(4), torch.randn(500) * 1e-3, torch.randn(9)]
    flat = torch.cat([each.float().flatten() for each in parts]).abs()
    for count in (1, 7, 100, 690, 2000):
        limit, chosen, start = threshold(lambda: parts, count), [], 0
        for part in parts:
            at, limit = taken(part, limit)
            chosen.append(at + start)
            start += part.numel()
        expected = flat.argsort(descending=True, stable=True)[:count]
        expected = expected[flat[expected] > 0].sort().values
        assert torch.equal(torch.cat(chosen), expected)


def test_what_cannot_be_compared_is_one_clear_error(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama)
    other = tmp_path / "other"
    tiny_llama(torch.bfloat16, intermediate_size=18).save_pretrained(other)
    with pytest.raises(SpftFileError, match="have different tensors"):
        extract(base, other, 0.1)
    with pytest.raises(SpftFileError, match="nothing to extract"):
        extract(base, base, 0.1)
    with pytest.raises(SpftFileError, match="`density 0` must be in"):
        extract(base, base, 0)
